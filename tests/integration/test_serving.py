"""A published model behind Ray Serve, asked over HTTP with the official OpenAI client."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from serving_service import MAX_LEN, Service, start_service

from jobs.data.tokenizer import load_tokenizer
from jobs.evaluation.quality import greedy_reference

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RECIPE = Path(__file__).parents[2] / "deploy" / "recipes" / "serve.yaml"
PROMPTS = [f"def read_{name}(path" for name in ("file", "line", "all", "x" * 50, "é€")] * 4


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with start_service(tmp_path_factory.mktemp("serving"), "serving") as started:
        serve_deploy(started)
        started.wait_until_ready()
        yield started


def serve_deploy(service: Service) -> None:
    """Run `serve deploy` on the recipe, with this test's model, paths, port and small bounds."""
    config = yaml.safe_load(RECIPE.read_text().replace("stdlib-tiny", "tiny"))
    engine, gateway = (application["args"] for application in config["applications"])
    engine["registry"] = str(service.folder / "registry")
    engine["engine_options"] = {"max_slots": 2, "max_len": MAX_LEN}
    gateway["port"] = service.session.serve_port
    gateway["max_accepted_choices"] = 40
    path = service.folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "deploy", str(path)]
    command += ["--address", service.session.dashboard_url]
    environment = {**os.environ, **service.session.environment()}
    subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True)


def test_models_when_listed_names_the_published_version(service):
    (model,) = service.client().models.list().data
    assert (model.id, model.root) == ("tiny", "tiny@1")


def test_completion_when_greedy_equals_the_offline_answer_for_all_prompts(service):
    tokenizer = load_tokenizer(service.registry.resolve("tiny@1").path)
    model = service.model()
    client = service.client()

    def ask(prompt: str) -> tuple[list[int], str]:
        completion = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=16,
            temperature=0,
            extra_body={"return_token_ids": True},
        )
        assert completion.usage.completion_tokens == 16
        return completion.choices[0].token_ids, completion.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, PROMPTS))
    expected = [greedy_reference(model, tokenizer.encode(p), 16, {1}) for p in PROMPTS]
    assert [token_ids for token_ids, _ in answers] == expected
    assert [text for _, text in answers] == [tokenizer.decode(ids) for ids in expected]


def test_completion_when_streamed_equals_the_whole(service):
    client = service.client()
    options = {"model": "tiny", "prompt": "def read_", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**options)
    chunks = list(
        client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == "length"


def test_chat_when_streamed_equals_the_whole(service):
    client = service.client()
    messages = [{"role": "user", "content": "read a file"}]
    options = {"model": "tiny@1", "messages": messages, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**options)
    with client.chat.completions.create(**options, stream=True) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 24


def test_completion_when_seeded_with_choices_repeats_all_of_them(service):
    client = service.client()
    options = {"model": "tiny", "prompt": ["a", "b"], "n": 3, "max_tokens": 8, "seed": 5}
    first, second = (client.completions.create(**options) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) == 6


def test_completion_when_prompt_is_too_long_is_400_with_the_code(service):
    with pytest.raises(openai.BadRequestError, match="32768 tokens") as caught:
        service.client().completions.create(model="tiny", prompt=[5] * MAX_LEN)
    assert caught.value.code == "context_length_exceeded"


def test_completion_when_prompt_has_no_such_token_is_400(service):
    with pytest.raises(openai.BadRequestError, match="token id 300"):
        service.client().completions.create(model="tiny", prompt=[300])


def test_completion_when_n_is_out_of_range_is_400(service):
    with pytest.raises(openai.BadRequestError, match="less than or equal to 8"):
        service.client().completions.create(model="tiny", prompt="x", n=9)


def test_completion_when_model_is_unknown_is_404(service):
    with pytest.raises(openai.NotFoundError, match="`tiny`"):
        service.client().completions.create(model="large", prompt="x")


def test_models_when_key_is_wrong_is_401(service):
    with pytest.raises(openai.AuthenticationError, match="no valid API key"):
        service.client(api_key="wrong").models.list()


def long_stream(client: openai.OpenAI, n: int):
    """Start `n` choices that take half a minute and more, and return once they generate."""
    stream = client.completions.create(
        model="tiny", prompt="def", max_tokens=32000, temperature=0, n=n, stream=True
    )
    next(iter(stream))
    return stream


@pytest.mark.parametrize("n", [2, 8])
def test_stream_when_client_leaves_frees_the_engine(service, n):
    with service.client() as client:
        long_stream(client, n).close()
    # All slots were taken; this waits for them unless the engine was told.
    quick = service.client(timeout=10).completions.create(model="tiny", prompt="a", max_tokens=2)
    assert quick.usage.completion_tokens == 2
    page = service.get("/metrics").text
    assert "raysmith_accepted_choices 0.0" in page


def test_completion_when_client_leaves_frees_the_engine(service):
    with pytest.raises(openai.APITimeoutError):
        service.client(timeout=1).completions.create(
            model="tiny", prompt="def", max_tokens=32000, temperature=0, n=2
        )
    quick = service.client(timeout=10).completions.create(model="tiny", prompt="a", max_tokens=2)
    assert quick.usage.completion_tokens == 2


def test_completion_when_server_is_full_is_429_at_once(service):
    with service.client() as client:
        streams = [long_stream(client, 8)]
        body = {"model": "tiny", "prompt": ["x"] * 3, "n": 8}
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**body)
        for stream in streams:
            stream.close()
    assert caught.value.response.headers["retry-after"] == "1"


def test_healthz_when_asked_without_a_key_answers(service):
    assert httpx.get(f"{service.url}/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "path", ["/", "/v1/models", "/readyz", "/metrics", "/-/routes", "/-/healthz"]
)
def test_port_when_asked_without_a_key_answers_nothing(service, path):
    response = httpx.get(f"{service.url}{path}")
    assert response.status_code in {401, 404}
    assert "tiny" not in response.text


def test_stream_when_its_only_replica_is_killed_goes_on_with_the_next_one(service):
    tokenizer = load_tokenizer(service.registry.resolve("tiny@1").path)
    with service.client(timeout=120) as client:
        stream = client.completions.create(
            model="tiny", prompt="def", max_tokens=4000, temperature=0, stream=True
        )
        chunks = [next(stream) for _ in range(20)]
        (pid,) = service.engine_pids()
        os.kill(pid, signal.SIGKILL)
        chunks += list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    # The reference has no cache and takes long: it is compared at the beginning, the rest with a
    # second answer, which no loss disturbed.
    expected = greedy_reference(service.model(), tokenizer.encode("def"), 64, {1})
    assert text.startswith(tokenizer.decode(expected))
    again = service.client(timeout=120).completions.create(
        model="tiny", prompt="def", max_tokens=4000, temperature=0
    )
    assert text == again.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
