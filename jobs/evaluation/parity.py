"""Whether an endpoint answers what its model says.

Takes a served model's directory and an OpenAI-compatible address; gives how many greedy answers
over REST equal those of a plain forward pass over the same directory, token for token. It does not
know which engine serves.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

from cluster.errors import EngineError
from jobs.compression.packing import load_model
from jobs.data.tokenizer import load_tokenizer
from jobs.evaluation.quality import greedy_reference
from jobs.models.decoder import stop_token_ids


@dataclass(frozen=True)
class Endpoint:
    """Where and as whom to ask."""

    base_url: str
    api_key: str
    model: str
    timeout_s: float = 120.0


@dataclass(frozen=True)
class Disagreement:
    """One prompt whose two answers differ."""

    prompt: str
    offline: str
    served: str


@dataclass(frozen=True)
class ParityReport:
    """How many of the prompts were answered alike."""

    num_prompts: int
    disagreements: tuple[Disagreement, ...]

    @property
    def num_equal(self) -> int:
        """Prompts with equal answers."""
        return self.num_prompts - len(self.disagreements)

    @property
    def is_exact(self) -> bool:
        """Whether every answer is equal."""
        return not self.disagreements


def check_parity(
    directory: Path,
    endpoint: Endpoint,
    prompts: Sequence[str],
    *,
    max_tokens: int = 24,
    concurrency: int = 8,
) -> ParityReport:
    """Ask every prompt offline and over REST, greedily, and compare the decoded tokens.

    Prompts are asked `concurrency` at a time, so that batches form. Raises EngineError if the
    endpoint refuses one or cannot be reached.
    """
    offline = offline_answers(directory, prompts, max_tokens=max_tokens)
    return compare(prompts, offline, endpoint, max_tokens=max_tokens, concurrency=concurrency)


def compare(
    prompts: Sequence[str],
    offline: Sequence[str],
    endpoint: Endpoint,
    *,
    max_tokens: int,
    concurrency: int = 8,
) -> ParityReport:
    """Ask every prompt over REST and compare with its offline answer; see `check_parity`."""
    with (
        httpx.Client(timeout=endpoint.timeout_s, trust_env=False) as client,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        try:
            served = list(pool.map(lambda p: _ask(client, endpoint, p, max_tokens), prompts))
        except BaseException:  # The rest is not asked; what was, is waited for.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    differing = tuple(
        Disagreement(prompt, expected, found)
        for prompt, expected, found in zip(prompts, offline, served, strict=True)
        if expected != found
    )
    return ParityReport(len(prompts), differing)


def offline_answers(directory: Path, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
    """Return the greedy continuation of every prompt, by plain forward passes.

    Nothing is kept from one to the next; keys and values are rounded as the directory says.
    """
    loaded = load_model(directory)
    tokenizer = load_tokenizer(directory)
    stop_ids = stop_token_ids(directory, tokenizer.eos_token_id)
    answers = []
    with _one_thread():
        for prompt in prompts:
            prompt_ids = tokenizer.encode(prompt)
            answer_ids = greedy_reference(
                loaded.model, prompt_ids, max_tokens, stop_ids, kv_cache=loaded.kv_cache
            )
            answers.append(tokenizer.decode(answer_ids, skip_special_tokens=True))
    return answers


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: short passes gain nothing from more.

    Beside a busy replica the threads of one pass spin while they wait for each other: 50 prompts
    took 122 s with two threads on two busy cores, and 5 s with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ask(client: httpx.Client, endpoint: Endpoint, prompt: str, max_tokens: int) -> str:
    body = {
        "model": endpoint.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    try:
        response = client.post(f"{endpoint.base_url}/completions", headers=headers, json=body)
    except httpx.HTTPError as error:
        raise EngineError(f"{endpoint.base_url} did not answer a parity prompt: {error}") from error
    if response.status_code != httpx.codes.OK:
        raise EngineError(
            f"{endpoint.base_url} answered {response.status_code} to a parity prompt: "
            f"{response.text[:300]}"
        )
    return str(response.json()["choices"][0]["text"])
