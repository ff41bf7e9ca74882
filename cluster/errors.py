"""Every exception Raysmith raises on purpose, in one tree.

Takes nothing; gives the classes. It does not know how an error is shown: the command line and the
gateway render them once, at their edge.

    RaysmithError                     exit_code 1: the run failed
    ├── UserError                     exit_code 2: the input is wrong; nothing is lost
    │   ├── ConfigError               unknown key, wrong type, out of bounds, contradiction
    │   ├── DataError                 missing, empty, unreadable or too short data
    │   ├── TokenizerError            a tokenizer that does not fit the model or cannot be trained
    │   ├── PlacementError            does not fit the machines: memory, devices, layout
    │   ├── RecipeError               a compression recipe that cannot be applied to this model
    │   ├── ModelFormatError          a model directory that is not one, or of an unsupported shape
    │   ├── ModelNotFoundError        no such name, version or alias in the registry
    │   ├── VersionExistsError        a published version is never overwritten
    │   ├── AccountError              no such team or key, or one that is there already
    │   ├── PortTakenError            another process listens on a port that is needed
    │   └── RequestError              an inference request out of bounds
    │       └── ContextLengthError    a prompt, with what is asked for, longer than the context
    ├── ClusterError                  Ray cannot be reached, started or stopped
    │   └── VersionMismatchError      Ray or Python differ between here and the cluster
    ├── StorageError                  exit_code 2: disk full, no permission, unreadable
    │   ├── IntegrityError            bytes differ from their recorded digest
    │   └── LedgerError               the ledger cannot be opened, read or written
    ├── TrainingError                 a training run ended without a model
    ├── SearchError                   a search ended without a result
    ├── GateRefusedError              a model was measured and is not good, small or fast enough
    └── EngineError                   an inference engine stopped or cannot run a model

A message says what was asked, what was found and what to do. Each class takes exactly one string,
so that errors survive pickling between processes.
"""


class RaysmithError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """The whole text, as given."""
        return str(self.args[0])


class UserError(RaysmithError):
    """The input is wrong; nothing was started or lost."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration value is unknown, of the wrong type, out of bounds or contradicts another."""


class DataError(UserError):
    """Data is missing, empty, unreadable or too short."""


class TokenizerError(UserError):
    """A tokenizer does not fit the model or cannot be trained."""


class PlacementError(UserError):
    """The work does not fit the machines."""


class RecipeError(UserError):
    """A compression recipe cannot be applied to this model."""


class ModelFormatError(UserError):
    """A directory is not a model, or of a shape that is not supported."""


class ModelNotFoundError(UserError):
    """The registry has no such name, version or alias."""


class VersionExistsError(UserError):
    """A published version would be overwritten."""


class AccountError(UserError):
    """The ledger has no such team or key, or has one already."""


class PortTakenError(UserError):
    """Another process listens on a port that is needed."""


class RequestError(UserError):
    """An inference request is out of bounds."""


class ContextLengthError(RequestError):
    """A prompt, with what is asked for after it, is longer than the model's context."""


class ClusterError(RaysmithError):
    """Ray cannot be reached, started or stopped."""


class VersionMismatchError(ClusterError):
    """Ray or Python differ between this process and the cluster."""


class StorageError(RaysmithError):
    """Reading or writing failed: what lies on the disk, or the room on it, is bad input."""

    exit_code = 2


class IntegrityError(StorageError):
    """Bytes differ from their recorded digest."""


class LedgerError(StorageError):
    """The ledger cannot be opened, read or written."""


class TrainingError(RaysmithError):
    """A training run ended without a model."""


class SearchError(RaysmithError):
    """A search ended without a result."""


class GateRefusedError(RaysmithError):
    """A model was measured and is not good, small or fast enough."""


class EngineError(RaysmithError):
    """An inference engine stopped or cannot run a model."""
