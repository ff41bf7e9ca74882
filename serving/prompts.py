"""Prompts to token ids, with the model's own tokenizer and chat template.

Takes prompts as clients give them; gives token ids. It does not know how they are continued.
"""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from cluster.errors import RequestError
from serving.messages import ChatPrompt, Prompt, TextPrompt, TokenPrompt


class PromptEncoder:
    """Encodes prompts for one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Return at least one token id. Raises RequestError for a prompt that gives none."""
        token_ids = self._token_ids(prompt)
        if not token_ids:
            raise RequestError("the prompt is empty: the model needs at least one token.")
        return token_ids

    def _token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, TokenPrompt):
            return prompt.token_ids
        if isinstance(prompt, TextPrompt):
            return tuple(self._tokenizer.encode(prompt.text))
        # The template writes special tokens itself.
        text = self._chat_text(prompt)
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _chat_text(self, prompt: ChatPrompt) -> str:
        if self._tokenizer.chat_template is None:
            raise RequestError("this model has no chat template. Use /v1/completions.")
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.turns]
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise RequestError(f"the model's chat template refuses this: {error}") from error
        return text
