"""Conversations with tools, written out by a template of the form that Qwen and Hermes have."""

import json

import pytest

from cluster.errors import RequestError
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


@pytest.fixture
def with_template(tokenizer):
    """A way to set another template for one test."""

    def change(template: str):
        tokenizer.chat_template = template
        return tokenizer

    yield change
    tokenizer.chat_template = TEMPLATE


@pytest.mark.parametrize("ending", ["", "]" * 100_000])
def test_chat_when_called_arguments_are_nested_too_deeply_is_refused(tokenizer, ending):
    deep = Turn("assistant", "", tool_calls=calls("[" * 100_000 + ending))
    with pytest.raises(RequestError, match="call of `f` are nested too deeply"):
        written(tokenizer, deep)


def test_chat_when_the_template_raises_in_its_own_way_is_refused_with_the_reason(with_template):
    tokenizer = with_template("{% for m in messages %}{{ m.role + 1 }}{% endfor %}")
    with pytest.raises(RequestError, match="cannot write this conversation: TypeError: can only"):
        written(tokenizer, Turn("user", "hi"))


def test_chat_when_called_arguments_hold_half_a_character_is_refused(tokenizer):
    half = Turn("assistant", "", tool_calls=calls(r'"\ud800"'))
    with pytest.raises(RequestError, match="cannot write this conversation: UnicodeEncodeError"):
        written(tokenizer, half)


def test_chat_when_the_template_quotes_what_it_refuses_says_it_in_few_words(with_template):
    quoting = "{{ raise_exception('no: ' ~ messages[0].tool_calls[0].function.arguments) }}"
    call = calls(json.dumps("\ud800" * 10_000))
    with pytest.raises(RequestError, match=r"template refuses this: no: \?\?") as raised:
        written(with_template(quoting), Turn("assistant", "", tool_calls=call))
    assert len(raised.value.message.encode()) < 400
