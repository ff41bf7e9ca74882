"""LoRA adapters of a transformers model, through its own support of PEFT directories.

Takes adapters by name; makes one of them, or none, the one that passes use. It does not know which
sequence asks for which.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from cluster.errors import ConfigError, ModelFormatError


class Adapters:
    """Adapters loaded beside one model."""

    def __init__(self, model: PreTrainedModel, directories: Mapping[str, str]) -> None:
        """Load all; raises ConfigError without PEFT, ModelFormatError for what is no adapter."""
        self._model = model
        self._active: str | None = None
        if directories and importlib.util.find_spec("peft") is None:
            raise ConfigError("`adapters` need peft, which is not installed: pip install peft.")
        for name, directory in directories.items():
            if not (Path(directory) / "adapter_config.json").is_file():
                raise ModelFormatError(
                    f"adapter `{name}`: {directory} has no adapter_config.json. Give a PEFT "
                    "directory."
                )
            model.load_adapter(directory, adapter_name=name)
        if directories:
            model.disable_adapters()
            model.eval()

    def use(self, name: str | None) -> None:
        """Make the passes that follow use an adapter, or none."""
        if name == self._active:
            return
        if name is None:
            self._model.disable_adapters()
        else:
            self._model.enable_adapters()
            self._model.set_adapter(name)
        self._active = name
