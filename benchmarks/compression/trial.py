"""One trained model on trial: the losses of its compressed forms on held-out text.

Takes a model directory and its data; gives losses by contender, each computed once however many
sections ask. It does not know what is made of them.

N sequences, T tokens of one
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._remembered import Remembered
from benchmarks.compression.contenders import CONTENDERS, DENSE, Contender
from benchmarks.compression.remembered import Measured, remembered
from benchmarks.compression.subject import SEQ_LEN, Subject
from benchmarks.serving.models import BENCH
from jobs.compression.packing import load_model, save_compressed
from jobs.compression.recipe import Compressed, apply_recipe, predicted_bytes
from jobs.compression.text import CalibrationText, open_text, read_text
from jobs.config import CalibrationConfig, DecoderConfig, GateConfig, Recipe
from jobs.data.tokens import open_split
from jobs.evaluation.quality import sequence_losses
from jobs.models import _hf, decoder
from jobs.models.decoder import Decoder

Say = Callable[[str], None]
_LINE_EVERY_STEPS = 10
# Activations of one sequence stay in the caches: 1,250 tokens a CPU-second of an AVX2 core against
# 1,100 of 8 at once; the C++ operators 1,400, of 1,540 that its matrix products alone allow.
_SEQUENCES_AT_ONCE = 1


class Trial:
    """A model, held-out sequences [N, T+1] and calibration text."""

    def __init__(
        self,
        name: str,
        model: Path,
        sequences: NDArray[np.int64],
        text: CalibrationText,
        say: Say,
        known: Remembered | None = None,
    ) -> None:
        self.name, self.model, self.sequences = name, model, sequences
        self.shape: DecoderConfig = _hf.from_hf_config(_hf.read_config(model))
        self.text, self._say = text, say
        self._measured: dict[str, Measured] = {}
        self._known = known

    @classmethod
    def open(
        cls, subject: Subject, num_sequences: int | None, num_calibration: int, say: Say
    ) -> Self:
        """Return a subject's trial on its test split, whole unless a number is given.

        The sequences lie in the order in which the gate draws them, so that its own are the first.
        """
        split = open_split(subject.data, "test")
        found = split.num_sequences(SEQ_LEN)
        count = found if num_sequences is None else min(num_sequences, found)
        sequences = split.sample(count, SEQ_LEN, GateConfig().seed)
        calibration = CalibrationConfig(
            data=str(subject.data), num_sequences=num_calibration, seq_len=SEQ_LEN
        )
        shape = _hf.from_hf_config(_hf.read_config(subject.model))
        text = read_text(calibration, open_text(calibration, subject.model, shape))
        texts = [sequences, text.tokens_NT.numpy()]
        known = remembered(BENCH / "losses", subject.model, texts)
        return cls(subject.config.name, subject.model, sequences, text, say, known)

    @property
    def num_held_out_tokens(self) -> int:
        """Tokens that are predicted."""
        return int(self.sequences[:, 1:].size)

    @property
    def num_calibration_tokens(self) -> int:
        """Tokens that methods see."""
        return self.text.tokens_NT.numel()

    @property
    def known(self) -> dict[str, NDArray[np.float64]]:
        """Losses computed so far."""
        return {name: found.losses for name, found in self._measured.items()}

    def date(self, name: str) -> str:
        """Return the day on which losses that are known were measured."""
        return self._measured[name].date

    def losses(self, name: str) -> NDArray[np.float64]:
        """Return a contender's losses [N], computed at the first call or remembered."""
        if name in self._measured:
            return self._measured[name].losses
        contender = CONTENDERS[name]

        def make() -> Decoder:
            if name == DENSE:
                return load_model(self.model, verify=False).model
            return as_stored(self.compress(contender.recipe), contender)

        return self.measure(name, make, contender.document())

    def measure(
        self, name: str, make: Callable[[], Decoder], what: Any = None
    ) -> NDArray[np.float64]:
        """Return the losses [N] of a model, and keep them by a name.

        With `what`, all that decides the model beside this one and the text, they are remembered.
        """
        self._measured[name] = found = self._find(name, make, what)
        return found.losses

    def _find(self, name: str, make: Callable[[], Decoder], what: Any) -> Measured:
        if what is None or self._known is None:
            return Measured.now(self._measure(name, make))
        data = self._known.read(what)
        if data is None:
            found = Measured.now(self._measure(name, make))
            self._known.write(what, found.to_bytes())
            return found
        found = Measured.from_bytes(data)
        perplexity = np.exp(found.losses.mean())
        self._say(f"{self.name}: {name}: perplexity {perplexity:.3f}, measured {found.date}")
        return found

    def _measure(self, name: str, make: Callable[[], Decoder]) -> NDArray[np.float64]:
        start_s = time.perf_counter()
        model = make()
        made_s = time.perf_counter() - start_s
        losses = sequence_losses(model, self.sequences, _SEQUENCES_AT_ONCE)
        self._say(
            f"{self.name}: {name}: perplexity {np.exp(losses.mean()):.3f}; made in {made_s:.0f} s, "
            f"evaluated in {time.perf_counter() - start_s - made_s:.0f} s"
        )
        return losses

    def compress(self, recipe: Recipe) -> Compressed[Decoder]:
        """Return what a recipe makes of the model."""
        return apply_recipe(decoder.load(self.model), recipe, self.text, self._tell)

    def size_bytes(self, name: str) -> int | None:
        """Return the bytes of a contender's weights; None for other models that were measured."""
        found = CONTENDERS.get(name)
        return None if found is None else predicted_bytes(self.shape, found.recipe)

    def _tell(self, what: str, done: int, total: int) -> None:
        if what != "blocks" and done % _LINE_EVERY_STEPS == 0:  # Blocks are a matter of seconds.
            self._say(f"{self.name}: {what}: step {done} of {total}")


def as_stored(compressed: Compressed[Decoder], contender: Contender) -> Decoder:
    """Return what the files of a compressed model stand for, in the faster of two equal ways.

    Weights of few bits are multiplied as float32, dequantized, beside all else in the bfloat16 of
    the files: the operators that unpack them are made for few rows. Others go through the files.
    """
    if contender.is_served or not compressed.quantized:
        with tempfile.TemporaryDirectory(prefix="raysmith-bench-") as folder:
            save_compressed(compressed, Path(folder))
            return load_model(Path(folder), verify=False).model
    with torch.no_grad():
        for name, tensor in compressed.model.state_dict().items():
            if name.removesuffix(".weight") not in compressed.quantized:
                tensor.copy_(tensor.to(torch.bfloat16))
    return compressed.model
