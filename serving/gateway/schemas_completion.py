"""`/v1/completions`: continue one or several prompts.

Takes JSON; gives an `InferenceRequest`. It does not know who asks.
"""

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from serving.gateway.schemas_base import Text, Tokens, text_or_token_prompts
from serving.gateway.schemas_generation import Generation
from serving.messages import InferenceRequest

MAX_PROMPTS = 32
MAX_CHOICES = 64
DEFAULT_TOKENS = 16  # As OpenAI has it.

Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]


class CompletionRequest(Generation):
    """Continue one or several prompts."""

    _neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "best_of": (1, None),
        "echo": (False, None),
        "suffix": ("", None),
    }

    prompt: Text | Texts | Tokens | TokenLists = Field(description="What is continued.")
    logprobs: int | None = Field(
        default=None, ge=0, le=5, description="Alternatives reported for each token."
    )

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        choices = len(text_or_token_prompts(self.prompt)) * (self.n or 1)
        if choices > MAX_CHOICES:
            raise ValueError(f"`n` x prompts = {choices} choices; at most {MAX_CHOICES} a request")
        return self

    def inference(self) -> InferenceRequest:
        """Return what is asked of the model; 16 tokens unless said otherwise, as OpenAI does."""
        max_tokens = self.max_tokens or DEFAULT_TOKENS
        sampling = self._sampling(max_tokens, self.logprobs, self.structure())
        prompts = text_or_token_prompts(self.prompt)
        return InferenceRequest(prompts, sampling, self.n or 1, adapter=self.adapter)
