"""Model directories on their way between projects: do they load, and give equal logits?

Takes directories that this project and llmcompressor wrote of one model, and token ids; gives how
far logits of different libraries differ on the same directory, beside how far quantizing moved
them. What a library refuses, or computes wrongly on this CPU, is reported, not left out.

N sequences, T tokens, V words
"""

import asyncio
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.compression.estimates import Claim, at_least, at_most
from benchmarks.serving.models import BENCH, run_in
from cluster.errors import ConfigError
from jobs.compression.packing import copy_companions, load_model, save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import Recipe, Step
from jobs.kernels.build import cpu_flags
from jobs.kernels.formats import DEFAULT_GROUP_SIZE, GROUPED, Scheme
from jobs.models import decoder
from serving.engines._protocol import GenerateRequest
from serving.engines.native import EngineConfig, NativeEngine, start
from serving.engines.vllm.cpu import why_not

Logits = NDArray[np.float32]

_HAS_TRANSFORMERS = "llmcompressor"  # Its environment holds compressed-tensors, too.
_NUM_PROMPT, _NUM_ANSWER = 32, 16
_BF16_LIMIT = 0.01
LEAST_ENGINE_AGREEMENT = 0.98  # One of 64 choices may be a tie, which the order of sums decides.
_FORMATS: tuple[Scheme, ...] = ("bf16", "w8a8", "w4a16")


@dataclass(frozen=True)
class Difference:
    """How far two libraries' logits differ, as shares of the logits' standard deviation.

    `of_rounding` is how far storing the model in its format moved them, by our own arithmetic.
    """

    root_mean_square: float
    largest: float
    same_choice: float
    of_rounding: float

    def limit(self, scheme: str) -> float:
        """Return how far libraries may differ: as bfloat16 sums do, or rounding of activations.

        Libraries choose the scale of a token's 8-bit activations a little differently, and then
        each rounds by as much as the format itself costs.
        """
        return max(_BF16_LIMIT, self.of_rounding * (scheme == "w8a8"))

    def is_within_rounding(self, scheme: str) -> bool:
        """Whether libraries differ by no more than that."""
        return self.root_mean_square <= self.limit(scheme)


def measure_interop(
    model: Path, directories: Mapping[str, tuple[Path, Path]], tokens_NT: NDArray[np.int64]
) -> dict[str, Any]:
    """Return the report's `interop`; `directories` are ours and theirs by method."""
    tokens_NT = tokens_NT[:, : _NUM_PROMPT + _NUM_ANSWER]
    ours = {name: pair[0] for name, pair in directories.items()}
    theirs = {name: pair[1] for name, pair in directories.items()}
    with tempfile.TemporaryDirectory(dir=BENCH) as temporary:
        folder = Path(temporary)
        formats = write_formats(model, folder)
        dense_NTV = our_logits(model, tokens_NT)
        asked = {f"ours-{n}": p for n, p in (ours | formats).items()}
        asked |= {f"theirs-{n}": p for n, p in theirs.items()}
        by_transformers = transformers_logits(asked, tokens_NT, folder)
        report: dict[str, Any] = {"theirs_in_our_engine": {}, "ours_in_transformers": {}}
        for name, path in asked.items():
            whose, _, what = name.partition("-")
            found = _describe(
                compare(our_logits(path, tokens_NT), by_transformers[name], dense_NTV), what
            )
            if whose == "theirs":
                found["engine_agrees"] = engine_agreement(path, tokens_NT)
                report["theirs_in_our_engine"][what] = found
            else:
                report["ours_in_transformers"][what] = found
        report["ours_in_vllm"] = {
            name: _in_vllm(name, path, tokens_NT, dense_NTV, folder)
            for name, path in formats.items()
        }
    return report


def interop_claims(report: Mapping[str, Any]) -> list[Claim]:
    """Return the claims of `measure_interop`'s report, but for what this CPU does not support."""
    claims = []
    for part, directories in report.items():
        for name, found in directories.items():
            place = f"{part}.{name}"
            if found.get("not_supported_on_this_cpu"):
                continue
            claims.append(at_least(f"{place}.loads", float("refused" not in found), 1.0))
            if "refused" in found:
                continue
            distance = found["root_mean_square"]
            claims.append(at_most(f"{place}.root_mean_square", distance, found["limit"]))
            if "engine_agrees" in found:
                agrees = found["engine_agrees"]
                claims.append(at_least(f"{place}.engine_agrees", agrees, LEAST_ENGINE_AGREEMENT))
    return claims


def write_formats(
    model: Path, folder: Path, group_size: int = DEFAULT_GROUP_SIZE
) -> dict[str, Path]:
    """Write a model in every format, rounded to nearest; return the directories."""
    found: dict[str, Path] = {}
    for scheme in _FORMATS:
        found[scheme] = folder / scheme
        found[scheme].mkdir()
        options: dict[str, Any] = {"scheme": scheme}
        if scheme in GROUPED:
            options["group_size"] = group_size
        step = Step(method="rtn", options=options)
        compressed = apply_recipe(decoder.load(model), Recipe(steps=(step,)))
        save_compressed(compressed, found[scheme])
        copy_companions(model, found[scheme])
    return found


def our_logits(directory: Path, tokens_NT: NDArray[np.int64]) -> Logits:
    """Return [N, T, V] float32 of our operators."""
    model = load_model(directory, verify=False).model
    with torch.inference_mode():
        return model.head(model.hidden(torch.from_numpy(tokens_NT))).float().numpy()


def transformers_logits(
    directories: Mapping[str, Path], tokens_NT: NDArray[np.int64], folder: Path
) -> dict[str, Logits]:
    """Return [N, T, V] float32 of transformers by name of a directory."""
    np.save(folder / "tokens.npy", tokens_NT)
    outputs = {name: folder / f"{name}.npy" for name in directories}
    pairs = [str(p) for name in directories for p in (directories[name], outputs[name])]
    module = "benchmarks.peers.transformers_logits"
    run_in(_HAS_TRANSFORMERS, ["python", "-m", module, str(folder / "tokens.npy"), *pairs])
    return {name: np.load(path) for name, path in outputs.items()}


def vllm_logits(directory: Path, tokens_NT: NDArray[np.int64], folder: Path) -> Logits:
    """Return [N, T - 1, V] float32 of vLLM. Raises ConfigError with its words if it fails."""
    np.save(folder / "tokens.npy", tokens_NT)
    output = folder / "vllm.npy"
    module = "benchmarks.peers.vllm_logits"
    run_in(
        "vllm",
        ["python", "-m", module, str(folder / "tokens.npy"), str(directory), str(output)],
    )
    logits_NTV: Logits = np.load(output)
    return logits_NTV


def compare(one_NTV: Logits, other_NTV: Logits, dense_NTV: Logits) -> Difference:
    """Return how far two libraries' logits of one directory differ."""
    spread = float(dense_NTV.std())
    difference_NTV = one_NTV - other_NTV
    return Difference(
        root_mean_square=_root_mean_square(difference_NTV) / spread,
        largest=float(np.abs(difference_NTV).max()) / spread,
        same_choice=float((one_NTV.argmax(-1) == other_NTV.argmax(-1)).mean()),
        of_rounding=_root_mean_square(one_NTV - dense_NTV) / spread,
    )


def engine_agreement(directory: Path, tokens_NT: NDArray[np.int64]) -> float:
    """Return the share of our engine's greedy tokens that a whole forward pass chooses as well."""
    loaded = load_model(directory, verify=False)
    prompts = tokens_NT[:, :_NUM_PROMPT].tolist()
    engine = start(loaded, EngineConfig(max_slots=len(prompts), max_len=loaded.config.max_seq_len))
    try:
        answers = asyncio.run(_answers(engine, prompts))
    finally:
        engine.close()
    rows_NT = np.array([p + a for p, a in zip(prompts, answers, strict=True)])
    chosen_NT = our_logits(directory, rows_NT)[:, _NUM_PROMPT - 1 : -1].argmax(-1)
    return float((chosen_NT == rows_NT[:, _NUM_PROMPT:]).mean())


def reason_of(output: str) -> str:
    """Return what a process that failed says is wrong: its last line that names an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if re.search(r"\w*Error: ", line)), lines[-1])


async def _answers(engine: NativeEngine, prompts: Sequence[list[int]]) -> list[list[int]]:
    return await asyncio.gather(*(_answer(engine, prompt) for prompt in prompts))


async def _answer(engine: NativeEngine, prompt: list[int]) -> list[int]:
    request = GenerateRequest(
        prompt_tokens=tuple(prompt), max_tokens=_NUM_ANSWER, temperature=0.0, ignore_eos=True
    )
    return [token async for chunk in engine.generate(request) for token in chunk.token_ids]


def _in_vllm(
    scheme: str, directory: Path, tokens_NT: NDArray[np.int64], dense_NTV: Logits, folder: Path
) -> dict[str, Any]:
    # What our vLLM engine says of this CPU, beside what vLLM does here.
    expected = {"not_supported_on_this_cpu": why_not({scheme}, cpu_flags())}
    try:
        theirs_NTV = vllm_logits(directory, tokens_NT, folder)
    except ConfigError as error:
        return {**expected, "refused": reason_of(error.message)}
    ours_NTV = our_logits(directory, tokens_NT)[:, :-1]
    return {**expected, **_describe(compare(ours_NTV, theirs_NTV, dense_NTV[:, :-1]), scheme)}


def _describe(difference: Difference, scheme: str) -> dict[str, Any]:
    return {
        **vars(difference),
        "limit": difference.limit(scheme),
        "is_within_rounding": difference.is_within_rounding(scheme),
    }


def _root_mean_square(values: Logits) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))
