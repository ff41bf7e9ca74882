"""Tool calls in a model's text, whole and piece by piece, and how requests name tools."""

import json
import random

import pytest
from gateway_fakes import FakeBackend, Gateway, stream_documents

from serving.engines._protocol import FinishReason, GrammarKind
from serving.gateway.tool_calls import CallReading, ToolCall, ToolCallReader, read_call
from serving.messages import ChatPrompt, Delta, Started, Turn

CALL = '{"name": "get_weather", "arguments": {"city": "Oslo <b>"}}'
WHOLE = f"<tool_call>\n{CALL}\n</tool_call>"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def read(text: str, pieces: int = 1, reading: CallReading | None = None) -> list[object]:
    """Return texts, joined, and calls as (name, arguments), from so many random pieces."""
    rng = random.Random(pieces)
    cuts = sorted(rng.randint(0, len(text)) for _ in range(pieces - 1))
    reader = ToolCallReader(reading or CallReading())
    found: list[str | ToolCall] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found += reader.feed(text[start:end])
    found += reader.finish()
    joined: list[object] = []
    for item in found:
        if isinstance(item, ToolCall):
            joined.append((item.name, json.loads(item.arguments)))
        elif joined and isinstance(joined[-1], str):
            joined[-1] += item
        else:
            joined.append(item)
    return joined


OSLO = ("get_weather", {"city": "Oslo <b>"})


@pytest.mark.parametrize("pieces", [1, 2, 7, 40])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WHOLE, [OSLO]),
        (f"Let me look.\n\n{WHOLE}", ["Let me look.", OSLO]),
        (f"{WHOLE}\n{WHOLE}\n", [OSLO, OSLO]),
        (f"<tool_call>{CALL}", [OSLO]),
        ("a < b <tool_cal l>", ["a < b <tool_cal l>"]),
        ("ends with <tool_", ["ends with <tool_"]),
        ("spaces at the end  \n", ["spaces at the end  \n"]),
        ("<tool_call>no json</tool_call>!", ["<tool_call>no json</tool_call>!"]),
        ('<tool_call>{"name": 3}</tool_call>', ['<tool_call>{"name": 3}</tool_call>']),
        ("<tool_call>[]", ["<tool_call>[]"]),
        ("", []),
    ],
)
def test_reader_when_text_comes_in_pieces_finds_the_same(text, expected, pieces):
    assert read(text, pieces) == expected


def test_reader_when_one_call_is_allowed_drops_what_follows_it():
    assert read(f"{WHOLE}\n{WHOLE} more", reading=CallReading(is_single=True)) == [OSLO]


def test_reader_when_the_call_is_forced_reads_the_whole_answer():
    assert read(CALL, 5, CallReading(is_forced=True)) == [OSLO]
    assert read(CALL[:20], 2, CallReading(is_forced=True)) == [CALL[:20]]


def test_call_when_arguments_are_a_text_keeps_it():
    call = read_call('{"name": "f", "arguments": "{}"}')
    assert call is not None
    assert call.arguments == "{}"


def gateway_saying(*texts: str) -> Gateway:
    *first, last = texts
    batches = [[Started(1)], *([Delta(0, t, (1,))] for t in first)]
    return Gateway(FakeBackend(*batches, [Delta(0, last, (2,), FinishReason.STOP)]))


def test_chat_when_model_calls_a_tool_says_so():
    answer = gateway_saying("Wait. ", WHOLE).chat(tools=[TOOL]).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Wait."
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert json.loads(call["function"]["arguments"]) == OSLO[1]


def test_chat_when_nothing_but_a_call_is_said_has_no_content():
    message = gateway_saying(WHOLE).chat(tools=[TOOL]).json()["choices"][0]["message"]
    assert message["content"] is None


@pytest.mark.parametrize("fields", [{}, {"tools": [TOOL], "tool_choice": "none"}])
def test_chat_when_no_tool_may_be_called_gives_text_as_it_is(fields):
    gateway = gateway_saying(WHOLE)
    choice = gateway.chat(**fields).json()["choices"][0]
    assert choice["message"]["content"] == WHOLE
    assert choice["finish_reason"] == "stop"
    assert gateway.backend.asked[0].prompts[0].tools is None


def test_stream_when_model_calls_tools_numbers_them():
    gateway = gateway_saying("Wait", ". <tool", "_call>", CALL, f"</tool_call>{WHOLE}", "")
    chunks = [d["choices"][0] for d in stream_documents(gateway.chat(tools=[TOOL], stream=True))]
    assert "".join(c["delta"].get("content", "") for c in chunks) == "Wait."
    calls = [call for c in chunks for call in c["delta"].get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert [call["function"]["name"] for call in calls] == ["get_weather"] * 2
    reasons = [c["finish_reason"] for c in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["tool_calls"]


def test_chat_when_tools_are_given_passes_them_to_the_template():
    gateway = gateway_saying("x")
    gateway.chat(tools=[TOOL])
    assert json.loads(gateway.backend.asked[0].prompts[0].tools) == [TOOL]
    assert gateway.backend.asked[0].sampling.structure is None


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_chat_when_a_call_is_forced_asks_for_its_structure_and_reads_it(choice):
    gateway = gateway_saying(CALL)
    answer = gateway.chat(tools=[TOOL], tool_choice=choice).json()["choices"][0]
    assert answer["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    structure = gateway.backend.asked[0].sampling.structure
    assert structure.kind is GrammarKind.JSON_SCHEMA
    schema = json.loads(structure.text)
    assert schema["properties"]["name"] == {"const": "get_weather"}
    assert schema["properties"]["arguments"] == TOOL["function"]["parameters"]


def test_chat_when_one_of_several_calls_is_forced_offers_all():
    other = {"type": "function", "function": {"name": "other"}}
    gateway = gateway_saying(CALL)
    gateway.chat(tools=[TOOL, other], tool_choice="required")
    schema = json.loads(gateway.backend.asked[0].sampling.structure.text)
    assert [s["properties"]["name"]["const"] for s in schema["anyOf"]] == ["get_weather", "other"]


def test_chat_when_a_conversation_has_calls_passes_them_on():
    echo = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    gateway = gateway_saying("x")
    gateway.chat(
        messages=[
            {"role": "developer", "content": "be kind"},
            {"role": "assistant", "content": None, "tool_calls": [echo]},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "4"}]},
        ]
    )
    system, called, result = gateway.backend.asked[0].prompts[0].turns
    assert system == Turn("system", "be kind")
    assert (called.content, json.loads(called.tool_calls)) == (None, [echo])
    assert result == Turn("tool", "4", tool_call_id="call_1")
    assert isinstance(gateway.backend.asked[0].prompts[0], ChatPrompt)
