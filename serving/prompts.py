"""Prompts to token ids, with the model's own tokenizer and chat template.

Takes prompts as clients give them; gives token ids. It does not know how they are continued.
"""

import json
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from cluster.errors import RequestError
from serving.called_tools import template_calls
from serving.messages import ChatPrompt, Prompt, TextPrompt, TokenPrompt, Turn

_MOST_CHARACTERS = 300


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
        turns = [_message(turn) for turn in prompt.turns]
        try:
            tools = None if prompt.tools is None else json.loads(prompt.tools)
            text: str = self._tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=True
            )
            text.encode()  # Arguments of a call may have brought half of a surrogate pair.
        except TemplateError as error:
            raise RequestError(f"the model's chat template refuses this: {_cut(error)}") from error
        except Exception as error:  # Templates come with models: what they raise is not known here.
            reason = f"{type(error).__name__}: {_cut(error)}"
            raise RequestError(
                f"the model's chat template cannot write this conversation: {reason}"
            ) from error
        return text


def _message(turn: Turn) -> dict[str, Any]:
    """Return a message as templates expect it: without what it does not have."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.name is not None:
        message["name"] = turn.name
    if turn.tool_call_id is not None:
        message["tool_call_id"] = turn.tool_call_id
    if turn.tool_calls is not None:
        message["tool_calls"] = template_calls(turn.tool_calls)
    return message


def _cut(error: Exception) -> str:
    """Return what an error says, short, and as text that can be sent: it may quote a prompt."""
    return str(error)[:_MOST_CHARACTERS].encode(errors="replace").decode()
