"""One replica as one gateway sees it: its connection, its load, a request that is there.

Takes the directory's entry; gives what the fleet decides by. It does not choose.
"""

from serving.directory import ReplicaEntry
from serving.messages import ChatPrompt, InferenceRequest, Prompt, ServedModel, TextPrompt
from serving.transport import ReplicaConnection

_CHARACTERS_PER_TOKEN = 4
_GUESSED_ANSWER_TOKENS = 256


class Member:
    """A replica, connected or not yet."""

    def __init__(self, entry: ReplicaEntry) -> None:
        self.entry = entry
        self.connection = ReplicaConnection(entry.secret)
        self.tokens_in_flight = 0

    @property
    def reference(self) -> str:
        """The version that it runs."""
        return f"{self.entry.model}@{self.entry.version}"

    @property
    def is_usable(self) -> bool:
        """Whether it can be asked now."""
        is_draining = self.entry.is_draining or self.connection.is_draining
        return self.connection.is_open and not is_draining

    def answers(self, model: ServedModel) -> bool:
        """Return whether it can be asked for this version now."""
        return self.is_usable and is_of(self.entry, model)


class MemberAttempt:
    """A request at a replica; see `serving.continuation.Attempt`."""

    def __init__(self, member: Member, request: InferenceRequest) -> None:
        self.events = member.connection.generate(request)
        self.replica = member.entry.replica
        self._member = member
        self._tokens = _tokens_of(request)
        member.tokens_in_flight += self._tokens

    def deliver(self, num_tokens: int) -> None:
        """Take note of progress."""
        done = min(num_tokens, self._tokens)
        self._tokens -= done
        self._member.tokens_in_flight -= done

    def release(self) -> None:
        """Take note that the request is no longer there."""
        self._member.tokens_in_flight -= self._tokens
        self._tokens = 0


def is_of(entry: ReplicaEntry, model: ServedModel) -> bool:
    """Return whether a replica runs this version."""
    return (entry.model, entry.version) == (model.name, model.version)


def _tokens_of(request: InferenceRequest) -> int:
    """Return about how many tokens a request makes a replica compute."""
    answer = request.sampling.max_tokens or _GUESSED_ANSWER_TOKENS
    prompts = sum(map(prompt_tokens, request.prompts))
    return prompts + answer * (request.total_choices - len(request.finished))


def prompt_tokens(prompt: Prompt) -> int:
    """Return about how many tokens a prompt has."""
    if isinstance(prompt, TextPrompt):
        return len(prompt.text) // _CHARACTERS_PER_TOKEN + 1
    if isinstance(prompt, ChatPrompt):
        return sum(len(turn.content or "") for turn in prompt.turns) // _CHARACTERS_PER_TOKEN + 1
    return len(prompt.token_ids)


def start_of(prompt: Prompt) -> str:
    """Return what prompts begin with whose cached blocks may be shared."""
    if isinstance(prompt, TextPrompt):
        return prompt.text
    if isinstance(prompt, ChatPrompt):
        return prompt.turns[0].content or ""
    return repr(prompt.token_ids[:64])
