"""Examples in the OpenAPI page, by route; a test sends every one of them.

Takes nothing; gives request bodies. `tiny` stands for a served model, `mini` for a served encoder.
"""

from collections.abc import Mapping
from typing import Any

Body = dict[str, Any]

_WEATHER: Body = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look up the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
_ASK_WEATHER: Body = {"role": "user", "content": "What is the weather in Oslo?"}
_CITY: Body = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "population": {"type": "integer"}},
    "required": ["name", "population"],
    "additionalProperties": False,
}

COMPLETIONS: Mapping[str, Body] = {
    "A prompt": {"model": "tiny", "prompt": "def read_file(", "max_tokens": 32, "temperature": 0},
    "A stream with token counts": {
        "model": "tiny",
        "prompt": "def read_file(",
        "max_tokens": 32,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "Several prompts and choices, repeatable": {
        "model": "tiny",
        "prompt": ["def read_", "def write_"],
        "n": 2,
        "seed": 7,
        "temperature": 0.8,
        "top_p": 0.95,
        "min_p": 0.05,
        "stop": ["\n\n"],
    },
    "One of several texts": {
        "model": "tiny",
        "prompt": "The sky is",
        "structured_outputs": {"choice": ["blue", "grey"]},
    },
    "A regular expression, within two seconds": {
        "model": "tiny",
        "prompt": "Call me at ",
        "guided_regex": "[0-9]{3}-[0-9]{4}",
        "timeout_s": 2.0,
    },
    "Likelihoods of the tokens": {
        "model": "tiny",
        "prompt": [5, 6, 7],
        "logprobs": 2,
        "return_token_ids": True,
    },
}
CHATS: Mapping[str, Body] = {
    "A question": {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "What is the capital of Norway?"},
        ],
        "max_completion_tokens": 16,
    },
    "A stream": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "stream": True,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.2,
        "logit_bias": {"5": -100},
    },
    "A tool that may be called": {
        "model": "tiny",
        "messages": [_ASK_WEATHER],
        "tools": [_WEATHER],
        "tool_choice": "auto",
    },
    "What a tool gave back": {
        "model": "tiny",
        "messages": [
            _ASK_WEATHER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "4 degrees, rain"},
        ],
        "tools": [_WEATHER],
    },
    "JSON that follows a schema": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Describe Oslo."}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": _CITY, "strict": True},
        },
    },
}
EMBEDDINGS: Mapping[str, Body] = {
    "Two texts": {"model": "mini", "input": ["a file", "a folder"]},
    "Short vectors, in base64": {
        "model": "mini",
        "input": "a file",
        "encoding_format": "base64",
        "dimensions": 2,
    },
}
EVENT_STREAMS: Mapping[str, Body] = {
    "A chat for a browser": {
        "endpoint": "/v1/chat/completions",
        "body": {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]},
    },
    "A completion for a browser": {
        "endpoint": "/v1/completions",
        "body": {"model": "tiny", "prompt": "def read_"},
    },
}


def request_examples(bodies: Mapping[str, Body]) -> dict[str, Any]:
    """Return what adds examples to a route's description."""
    examples = {name: {"summary": name, "value": body} for name, body in bodies.items()}
    return {"requestBody": {"content": {"application/json": {"examples": examples}}}}
