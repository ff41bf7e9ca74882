"""Conversations with tools, written out by a template of the form that Qwen and Hermes have."""

import json

import pytest

from jobs.data.tokenizer import load_tokenizer, train_tokenizer
from serving.messages import ChatPrompt, Turn
from serving.prompts import PromptEncoder

TEMPLATE = (
    "{% if tools %}TOOLS {% for tool in tools %}{{ tool | tojson }} {% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "</tool_call>{% endfor %}{% if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["def read_file(path): return path\n" * 20], 300, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def written(tokenizer, *turns: Turn, tools: str | None = None) -> str:
    return tokenizer.decode(PromptEncoder(tokenizer).encode(ChatPrompt(turns, tools)))


def calls(arguments: str) -> str:
    function = {"name": "f", "arguments": arguments}
    return json.dumps([{"id": "c1", "type": "function", "function": function}])


def test_chat_when_tools_are_given_shows_them_to_the_model(tokenizer):
    text = written(tokenizer, Turn("user", "hi"), tools=json.dumps([TOOL]))
    assert text == f"TOOLS {json.dumps(TOOL)} [user]hi"
    assert written(tokenizer, Turn("user", "hi")) == "[user]hi"


def test_chat_when_a_tool_was_called_writes_the_call_as_the_model_did(tokenizer):
    turns = (Turn("assistant", None, tool_calls=calls('{"a": 1}')), Turn("tool", "4", None, "c1"))
    expected = '[assistant]<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>[tool]4(c1)'
    assert written(tokenizer, *turns) == expected


def test_chat_when_called_arguments_are_no_json_shows_them_as_text(tokenizer):
    text = written(tokenizer, Turn("assistant", "", tool_calls=calls("{oops")))
    assert '"arguments": "{oops"' in text
