"""`/v1/embeddings`: texts or token ids to vectors.

Takes JSON; gives an `EmbeddingRequest`. It does not know who asks.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from serving.gateway.limits import MAX_TIMEOUT_S
from serving.gateway.schemas_base import (
    IGNORED,
    Body,
    ModelName,
    Text,
    Tokens,
    text_or_token_prompts,
)
from serving.messages import EmbeddingRequest

MAX_INPUTS = 2048
MAX_DIMENSIONS = 65_536

Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_INPUTS)]


class EmbeddingsRequest(Body):
    """Embed one or several inputs."""

    _ignored: ClassVar[frozenset[str]] = IGNORED
    _neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: ModelName = Field(description="Id of a served encoder.")
    input: Text | Texts | Tokens | TokenLists = Field(description="What is embedded.")
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="Lists of numbers, or little-endian float32 in base64."
    )
    dimensions: int | None = Field(
        default=None, ge=1, le=MAX_DIMENSIONS, description="Only so many, normalised again."
    )
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        le=MAX_TIMEOUT_S,
        description="Give up after this time, in seconds (an extension).",
    )

    def embedding(self) -> EmbeddingRequest:
        """Return what is asked of the model."""
        return EmbeddingRequest(text_or_token_prompts(self.input), self.dimensions)
