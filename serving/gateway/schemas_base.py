"""What every request body has in common: strict types, bounds, fields that change nothing.

Takes JSON; gives checked values. Fields that could change an answer in ways this server cannot are
refused unless they have no effect; fields that never change an answer are accepted.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.gateway.errors import shorten
from serving.messages import TextPrompt, TokenPrompt

MAX_TOKENS = 1_000_000
MAX_CHARACTERS = 8_000_000
MAX_NAME_CHARACTERS = 300

TokenId = Annotated[int, Field(ge=0, le=2**31)]
Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]
ModelName = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]
# These never change an answer; docs/http-api.md lists them.
IGNORED = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)


class Body(BaseModel):
    """A JSON object; "3" is no number and true no integer, as in the OpenAI API."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    # Values without effect; any other asks for what this server cannot do.
    _neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    _ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_what_has_no_effect(cls, document: Any) -> Any:
        if not isinstance(document, dict):
            return document
        refused = [
            f"`{key}` = {shorten(document[key])}"
            for key, values in cls._neutral.items()
            if key in document and document[key] not in values
        ]
        if refused:
            raise ValueError(f"not supported by this server: {', '.join(refused)}; leave it out")
        dropped = cls._ignored | cls._neutral.keys()
        return {key: value for key, value in document.items() if key not in dropped}


def text_or_token_prompts(
    given: str | Sequence[str] | Sequence[int] | Sequence[list[int]],
) -> tuple[TextPrompt | TokenPrompt, ...]:
    """Return the prompts that any of the API's four forms spells."""
    if isinstance(given, str):
        return (TextPrompt(given),)
    single = tuple(item for item in given if isinstance(item, int))
    if single:
        return (TokenPrompt(single),)
    return tuple(
        TextPrompt(item) if isinstance(item, str) else TokenPrompt(tuple(item))
        for item in given
        if not isinstance(item, int)
    )
