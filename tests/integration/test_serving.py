"""A published model behind Ray Serve, asked over HTTP with the official OpenAI client."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import torch
import yaml

from cluster.session import HeadConfig, Session, start_head, stop_head
from cluster.storage import write_manifest
from jobs.config import DecoderConfig
from jobs.data.tokenizer import load_tokenizer, train_tokenizer
from jobs.evaluation.quality import greedy_reference
from jobs.models.decoder import Decoder, build, load, save
from jobs.registry import Registry
from serving.gateway.auth import make_key

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RECIPE = Path(__file__).parents[2] / "deploy" / "recipes" / "serve.yaml"
MAX_LEN = 32768
PROMPTS = [f"def read_{name}(path" for name in ("file", "line", "all", "x" * 50, "é€")] * 4


@dataclass
class Service:
    url: str
    key: str
    model: Decoder
    directory: Path
    session: Session

    def client(self, **options) -> openai.OpenAI:
        options = {"api_key": self.key, "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    directory = publish(folder)
    key = make_key(folder / "api-keys", "test")
    patch = pytest.MonkeyPatch()
    patch.setenv("RAYSMITH_STATE", str(folder / "state"))
    ports = {"gcs_port": 0, "dashboard_port": 0, "serve_port": 0}
    session = start_head(HeadConfig(name="serving", num_cpus=2, **ports))
    try:
        deploy(folder, session)
        wait_until_ready(session.serve_url)
        with torch.inference_mode():
            yield Service(session.serve_url, key, load(directory), directory, session)
    finally:
        stop_head(session)
        patch.undo()


def publish(folder: Path) -> Path:
    shape = DecoderConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        max_seq_len=MAX_LEN,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    source = folder / "source"
    train_tokenizer(["def read_file(path): return path\n" * 20], 300, source)
    model = build(shape, seed=3)
    with torch.no_grad():  # Its logit is 0, never the highest: greedy answers do not end early.
        model.model.embed_tokens.weight[1] = 0
    save(model, source)
    write_manifest(source, {"kind": "model"})
    registry = Registry(folder / "registry")
    entry = registry.publish(source, "tiny")
    registry.promote("tiny", entry.version)
    return entry.path


def deploy(folder: Path, session: Session) -> None:
    """Run `serve deploy` on the recipe, with this test's paths, port and small bounds."""
    config = yaml.safe_load(RECIPE.read_text())
    config["http_options"]["port"] = int(session.serve_url.rpartition(":")[2])
    args = config["applications"][0]["args"]
    args["registry"] = str(folder / "registry")
    args["api_keys_file"] = str(folder / "api-keys")
    args["engine_options"] = {"max_slots": 2, "max_len": MAX_LEN}
    args["max_accepted_choices"] = 40
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "deploy", str(path)]
    command += ["--address", session.dashboard_url]
    environment = {**os.environ, **session.environment()}
    subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True)


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    status, text = 0, ""
    while status != 200:
        assert time.monotonic() < deadline, f"not ready: {status} {text}"
        try:
            response = httpx.get(f"{url}/readyz", timeout=15)
            status, text = response.status_code, response.text
        except httpx.TransportError as error:
            text = str(error)
        time.sleep(0.2)


def test_models_when_listed_names_the_published_version(service):
    (model,) = service.client().models.list().data
    assert (model.id, model.root) == ("tiny", "tiny@1")


def test_completion_when_greedy_equals_the_offline_answer_for_all_prompts(service):
    tokenizer = load_tokenizer(service.directory)
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
    expected = [greedy_reference(service.model, tokenizer.encode(p), 16, {1}) for p in PROMPTS]
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


def test_completion_when_header_steers_serve_is_400(service):
    with pytest.raises(openai.BadRequestError, match="x-request-disconnect-disabled"):
        service.client().completions.create(
            model="tiny", prompt="x", extra_headers={"x-request-disconnect-disabled": "?1"}
        )


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
    page = httpx.get(f"{service.url}/metrics").text
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
        body = {"model": "tiny", "prompt": ["x"] * 5, "n": 8}
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**body)
        for stream in streams:
            stream.close()
    assert caught.value.response.headers["retry-after"] == "1"


def test_healthz_when_asked_without_a_key_answers(service):
    assert httpx.get(f"{service.url}/healthz").json() == {"status": "ok"}


def test_stream_when_its_replica_is_killed_fails_and_service_recovers(service):
    with service.client() as client:
        stream = long_stream(client, 1)
        os.kill(engine_pid(service.session), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="replica failed"):
            list(stream)
    wait_until_ready(service.url)
    answer = service.client().completions.create(model="tiny", prompt="a", max_tokens=2)
    assert answer.usage.completion_tokens == 2


def engine_pid(session: Session) -> int:
    details = session.request("/api/serve/applications/")
    deployments = details["applications"]["raysmith"]["deployments"]
    (replica,) = deployments["engine-tiny"]["replicas"]
    return replica["pid"]
