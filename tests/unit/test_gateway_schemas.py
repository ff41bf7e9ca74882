import pytest
from gateway_fakes import Gateway

from serving.messages import ChatPrompt, Sampling, TextPrompt, TokenPrompt, Turn


@pytest.fixture
def gateway():
    return Gateway()


def tool(name):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def named(name):
    return {"type": "function", "function": {"name": name}}


def asked(gateway):
    assert len(gateway.backend.asked) == 1
    return gateway.backend.asked[0]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", (TextPrompt("hi"),)),
        (["a", "b"], (TextPrompt("a"), TextPrompt("b"))),
        ([1, 2], (TokenPrompt((1, 2)),)),
        ([[1, 2], [3]], (TokenPrompt((1, 2)), TokenPrompt((3,)))),
        ("", (TextPrompt(""),)),
    ],
)
def test_completion_when_prompt_has_any_form_is_understood(gateway, prompt, expected):
    gateway.complete(prompt=prompt)
    assert asked(gateway).prompts == expected


def test_completion_when_only_required_fields_are_given_uses_openai_defaults(gateway):
    gateway.complete()
    assert asked(gateway).sampling == Sampling(max_tokens=16)
    assert asked(gateway).num_choices == 1


def test_completion_when_all_fields_are_given_passes_them_on(gateway):
    gateway.complete(
        max_tokens=3, temperature=0, top_p=0.5, top_k=7, n=2, seed=-5, stop="\n", logprobs=5
    )
    assert asked(gateway).sampling == Sampling(
        max_tokens=3, temperature=0.0, top_p=0.5, top_k=7, seed=-5, stop=("\n",), num_logprobs=5
    )
    assert asked(gateway).num_choices == 2


def test_chat_when_only_required_fields_are_given_has_no_token_limit(gateway):
    gateway.chat()
    assert asked(gateway).sampling == Sampling()
    assert asked(gateway).prompts == (ChatPrompt((Turn("user", "hi"),)),)


def test_chat_when_content_has_parts_joins_them(gateway):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    gateway.chat(messages=[{"role": "user", "content": parts, "name": "bob"}])
    assert asked(gateway).prompts == (ChatPrompt((Turn("user", "ab"),)),)


def test_chat_when_an_answer_is_sent_back_as_it_came_is_understood(gateway):
    answer = gateway.chat().json()["choices"][0]["message"]
    empty = {"annotations": None, "audio": None, "function_call": None, "tool_calls": []}
    question = {"role": "user", "content": "go on"}
    gateway.chat(messages=[{**answer, **empty}, question])
    turns = (Turn("assistant", "Hello"), Turn("user", "go on"))
    assert gateway.backend.asked[1].prompts == (ChatPrompt(turns),)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_chat_when_tokens_are_limited_by_either_name_passes_it_on(gateway, field):
    gateway.chat(**{field: 5})
    assert asked(gateway).sampling.max_tokens == 5


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 20}, 20)],
)
def test_chat_when_logprobs_are_asked_for_says_how_many(gateway, fields, expected):
    gateway.chat(**fields)
    assert asked(gateway).sampling.num_logprobs == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
        {"presence_penalty": None, "stop": None, "n": None, "seed": None, "max_tokens": None},
        {"best_of": 1, "echo": False, "suffix": None},
        {"stop": []},
    ],
)
def test_completion_when_fields_have_no_effect_is_answered(gateway, fields):
    assert gateway.complete(**fields).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"n": 1.5}, "n", "valid integer"),
        ({"n": "2"}, "n", "valid integer"),
        ({"n": True}, "n", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": -1}, "max_tokens", "-1"),
        ({"max_tokens": 10**7}, "max_tokens", "less than or equal to"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": 0}, "top_k", "greater than or equal to 1"),
        ({"repetition_penalty": 1e-30}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"seed": 2**63}, "seed", "less than or equal to"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "1 to 256"),
        ({"stop": [3]}, "stop", "a list of at most 4 strings"),
        ({"stop": "x" * 257}, "stop", "1 to 256"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": -1}, "logprobs", "greater than or equal to 0"),
        ({"prompt": []}, "prompt", "a list of token ids"),
        ({"prompt": [1, "a"]}, "prompt", "a list of token ids"),
        ({"prompt": [-1]}, "prompt", "a list of token ids"),
        ({"prompt": None}, "prompt", "expected a string"),
        ({"prompt": {"text": "x"}}, "prompt", "expected a string"),
        ({"prompt": ["x"] * 33}, "prompt", "expected a string"),
        ({"model": ""}, "model", "at least 1 character"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"temprature": 0}, "temprature", "not a field"),
    ],
)
def test_completion_when_a_field_is_wrong_names_it(gateway, fields, param, words):
    response = gateway.complete(**fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]
    assert gateway.backend.asked == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"best_of": 3}, "`best_of` = 3"),
        ({"echo": True}, "`echo` = True"),
        ({"suffix": "x"}, "`suffix` = 'x'"),
        ({"echo": True, "best_of": 2}, "`best_of` = 2, `echo` = True"),
        ({"stream_options": {"include_usage": True}}, "only allowed with `stream`"),
        ({"prompt": ["x"] * 9, "n": 8}, "72 choices; at most 64"),
    ],
)
def test_completion_when_it_asks_for_what_is_not_offered_says_so(gateway, fields, words):
    response = gateway.complete(**fields)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "at least 1 item"),
        ({"messages": "hi"}, "`messages`"),
        ({"messages": [{"role": "clown", "content": "x"}]}, "'clown'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "`messages.0.tool_call_id` is req"),
        ({"messages": [{"role": "assistant"}]}, "needs `content` or `tool_calls`"),
        ({"messages": [{"role": "user"}]}, "`messages.0.content` is required"),
        ({"messages": [{"role": "user", "content": None}]}, "`messages.0.content`: expected"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts like"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "tool_calls.0`"),
        ({"tools": [{"type": "function"}]}, "`tools.0.function` is required"),
        ({"tools": [tool("a b")]}, "`tools.0.function.name`"),
        ({"tool_choice": "required"}, "`tools` does not have"),
        ({"tools": [tool("f")], "tool_choice": named("g")}, "`tools` does not have"),
        ({"tool_choice": "sometimes"}, "`tool_choice`: expected 'none'"),
        ({"response_format": {"type": "xml"}}, "`response_format`"),
        ({"response_format": {"type": "json_schema"}}, "`response_format.json_schema` is req"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "at most one of"),
        ({"structured_outputs": {}}, "exactly one of"),
        ({"guided_json": "{"}, "valid JSON"),
        ({"guided_json": {"a": "x" * 100_001}}, "at most 100000"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "less than or equal to 100"),
        ({"timeout_s": 0}, "greater than 0"),
        ({"top_logprobs": 3}, "only allowed with `logprobs`"),
        ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "not both"),
    ],
)
def test_chat_when_a_field_is_wrong_names_it(gateway, fields, words):
    response = gateway.chat(**fields)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"k" * 100_000: 1},
        {f"k{number}": 1 for number in range(10_000)},
        {"logit_bias": {str(number): 1 for number in range(10_000)}},
    ],
)
def test_completion_when_much_is_wrong_is_answered_briefly(gateway, fields):
    response = gateway.complete(**fields)
    assert response.status_code == 400
    assert len(response.text) < 1000


@pytest.mark.parametrize("body", [b"{", b"", b"[1", b"nonsense", b"\xff\xfe", b'{"a": 1,}'])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_post_when_body_is_not_json_is_refused(gateway, path, body):
    response = gateway.call(
        "POST", path, content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"3", b"null", b'"x"', b"[]", b"{}"])
def test_post_when_body_is_no_request_is_refused(gateway, body):
    response = gateway.call(
        "POST", "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "\\ud800": 1}',
        b'{"model": "tiny", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "tiny", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
    ],
)
def test_post_when_values_are_hostile_is_refused(gateway, body):
    response = gateway.call(
        "POST", "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert len(response.json()["error"]["message"]) < 500
