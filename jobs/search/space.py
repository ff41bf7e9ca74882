"""What a search may choose: one format and sparsity for every group of layers.

Takes a SearchConfig and the shape of a decoder; gives the groups, the choices and what each takes
in bytes, and turns an assignment of choices into a recipe. Pure: it does not know how a recipe is
applied or scored, nor which assignments are worth trying.

A group is a part of `layers_per_group` consecutive blocks. Kernels fuse q, k and v, and gate and
up: no part divides them, so they share a choice.

S groups, C choices
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ConfigError
from jobs.compression.layers import linear_shapes
from jobs.compression.recipe import predicted_bytes
from jobs.config import DecoderConfig, Recipe, SearchConfig, Step
from jobs.config.search import Granularity
from jobs.evaluation.kernel_times import PRODUCTS
from jobs.kernels.formats import GROUPED, Layout

_PARTS: Mapping[Granularity, Mapping[str, tuple[str, ...]]] = {
    "part": {"self_attn": ("self_attn.*",), "mlp": ("mlp.*",)},
    "fused": PRODUCTS,
}
_GROUP_SIZES = (128, 64, 32)
_DENSE = "bf16"

Assignment = tuple[int, ...]  # The index of a choice for every group; empty: the unchanged model.
UNCHANGED: Assignment = ()


@dataclass(frozen=True, order=True)
class Group:
    """Layers that share a choice: one part of the blocks [first, stop)."""

    first: int
    part: str
    stop: int
    layers: tuple[str, ...]

    @property
    def title(self) -> str:
        """What tables call it."""
        return f"{self.part} {_ranges(range(self.first, self.stop))}"

    @property
    def products(self) -> tuple[str, ...]:
        """The products of one block that its layers are multiplied by."""
        return tuple(
            name
            for name, layers in PRODUCTS.items()
            if all(any(fnmatchcase(layer, own) for own in self.layers) for layer in layers)
        )

    @property
    def targets(self) -> tuple[str, ...]:
        """Patterns over the names of this group's linear layers."""
        return tuple(
            f"model.layers.{block}.{layer}"
            for block in range(self.first, self.stop)
            for layer in self.layers
        )


@dataclass(frozen=True, order=True)
class Choice:
    """What is done to a group."""

    scheme: str
    sparsity: float

    @property
    def is_nothing(self) -> bool:
        """Whether the group stays as it is."""
        return self.scheme == _DENSE and not self.sparsity

    def __str__(self) -> str:
        pruned = f"{self.sparsity:.0%} zeros, " if self.sparsity else ""
        return f"{pruned}{self.scheme}"


@dataclass(frozen=True)
class Space:
    """Every assignment a search may try; sizes are additive over groups."""

    config: SearchConfig
    decoder: DecoderConfig
    groups: tuple[Group, ...]
    choices: tuple[Choice, ...]
    base_bytes: int
    saved_bytes_SC: NDArray[np.int64]  # noqa: N815
    saved_memory_SC: NDArray[np.int64]  # noqa: N815

    def uniform(self, choice: int) -> Assignment:
        """Return the assignment that makes one choice everywhere."""
        return (choice,) * len(self.groups)

    def size_bytes(self, assignment: Assignment) -> int:
        """Return the bytes of all weights on disk, but for the file's header."""
        return self.base_bytes - self._saved(self.saved_bytes_SC, assignment)

    def memory_bytes(self, assignment: Assignment) -> int:
        """Return the bytes of all weights in memory, as their formats say."""
        return self.base_bytes - self._saved(self.saved_memory_SC, assignment)

    def recipe(self, assignment: Assignment, *, real: bool) -> Recipe:
        """Return the recipe that carries an assignment out: pruning first, then quantization.

        `real` takes the methods that the config asks for, else the plain ones that need no text.
        Groups of equal choice share a step, and a step that covers all groups targets `*`.
        """
        chosen = {g: self.choices[c] for g, c in zip(self.groups, assignment, strict=False)}
        kv_cache = self.config.kv_cache if assignment else "auto"
        return Recipe(steps=self._steps(chosen, real=real), kv_cache=kv_cache)

    def alone(self, group: int, choice: int) -> Recipe:
        """Return the recipe that makes one choice for one group, by plain methods."""
        chosen = {self.groups[group]: self.choices[choice]}
        return Recipe(steps=self._steps(chosen, real=False))

    def changes(self, assignment: Assignment) -> bool:
        """Return whether an assignment does anything to any group."""
        return any(not self.choices[choice].is_nothing for choice in assignment)

    def _steps(self, chosen: Mapping[Group, Choice], *, real: bool) -> tuple[Step, ...]:
        steps: list[Step] = []
        for sparsity in sorted({choice.sparsity for choice in chosen.values()} - {0.0}):
            targets = self._targets([g for g, c in chosen.items() if c.sparsity == sparsity])
            options: dict[str, object] = {"sparsity": sparsity}
            method = self.config.pruning if real else "magnitude"
            if method == "magnitude" and self.config.pruning == "wanda":
                options["among"] = "row"  # As those compete that it stands in for.
            steps.append(Step(method=method, targets=targets, options=options))
        if steps and real and self.config.repair_tokens:
            repair = {"num_tokens": self.config.repair_tokens}
            steps.append(Step(method="distill", options=repair))
        quantized = [group for group, choice in chosen.items() if choice.scheme != _DENSE]
        *preparing, quantizing = self.config.quantizer.split("+") if real else ["rtn"]
        if quantized:
            targets = self._targets(quantized)
            steps.extend(Step(method=method, targets=targets) for method in preparing)
        for scheme in sorted({choice.scheme for choice in chosen.values()} - {_DENSE}):
            targets = self._targets([g for g, c in chosen.items() if c.scheme == scheme])
            steps.append(_quantize(quantizing, scheme, targets, self.decoder))
        return tuple(steps)

    def _targets(self, groups: Sequence[Group]) -> tuple[str, ...]:
        if len(groups) == len(self.groups):
            return ("*",)
        return tuple(target for group in groups for target in group.targets)

    @property
    def has_plain_methods(self) -> bool:
        """Whether recipes that are real are those that need no text, too."""
        config = self.config
        prunes = any(config.sparsities)
        is_plain = config.pruning == "magnitude" and not config.repair_tokens
        return config.quantizer == "rtn" and (is_plain or not prunes)

    def describe(self, assignment: Assignment) -> str:
        """Return a short text for tables: what is done to which part of which blocks."""
        found: dict[Choice, list[Group]] = {}
        for group, number in zip(self.groups, assignment, strict=False):
            found.setdefault(self.choices[number], []).append(group)
        if not found:
            return _DENSE
        if len(found) == 1:
            return f"{next(iter(found))} all"
        return "; ".join(f"{choice} {_where(groups)}" for choice, groups in sorted(found.items()))

    @staticmethod
    def _saved(saved_SC: NDArray[np.int64], assignment: Assignment) -> int:
        if not assignment:
            return 0
        return int(saved_SC[np.arange(len(assignment)), list(assignment)].sum())


def build_space(config: SearchConfig, decoder: DecoderConfig) -> Space:
    """Return the space of a search over models of this shape.

    Raises ConfigError where a format has groups and no size of one divides the model's widths, and
    where nothing but the unchanged model could be chosen.
    """
    choices = tuple(sorted({Choice(s, p) for s, p in product(config.schemes, config.sparsities)}))
    if all(choice.is_nothing for choice in choices):
        raise ConfigError(
            f"`schemes` = {config.schemes} and `sparsities` = {config.sparsities} leave nothing to "
            "try but the unchanged model. Add a scheme."
        )
    groups = tuple(layer_groups(decoder, config.layers_per_group, config.granularity))
    stored, resident = _bytes_saved(decoder, groups, choices)
    return Space(
        config, decoder, groups, choices, predicted_bytes(decoder, Recipe()), stored, resident
    )


def layer_groups(
    decoder: DecoderConfig, layers_per_group: int, granularity: Granularity = "part"
) -> list[Group]:
    """Return the groups of a decoder, in order of the blocks."""
    return [
        Group(first, part, min(first + layers_per_group, decoder.num_layers), layers)
        for first in range(0, decoder.num_layers, layers_per_group)
        for part, layers in _PARTS[granularity].items()
    ]


def layers_of(group: Group, names: Sequence[str]) -> list[str]:
    """Return which of these linear layers belong to a group."""
    prefixes = tuple(target.removesuffix("*") for target in group.targets)
    return [name for name in names if name.startswith(prefixes)]


def _bytes_saved(
    decoder: DecoderConfig, groups: Sequence[Group], choices: Sequence[Choice]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return bytes that each choice saves of each group, on disk and in memory: [S, C] each."""
    shapes = linear_shapes(decoder)
    saved = np.zeros((2, len(groups), len(choices)), np.int64)
    for s, group in enumerate(groups):
        mine = [shapes[name] for name in layers_of(group, list(shapes))]
        for c, choice in enumerate(choices):
            layout = layout_of(choice.scheme, decoder)
            for shape in mine:
                dense_bytes = Layout("bf16").stored_bytes(*shape)
                saved[0, s, c] += dense_bytes - layout.stored_bytes(*shape)
                saved[1, s, c] += dense_bytes - layout.computable().stored_bytes(*shape)
    return saved[0], saved[1]


def layout_of(scheme: str, decoder: DecoderConfig) -> Layout:
    """Return the format of a scheme on this model: with the largest group size that divides."""
    group_size = _group_size(decoder) if scheme in GROUPED else None
    return Layout(scheme, group_size)  # type: ignore[arg-type]  # a choice's scheme is a Scheme


def _quantize(method: str, scheme: str, targets: tuple[str, ...], decoder: DecoderConfig) -> Step:
    options: dict[str, object] = {"scheme": scheme}
    if scheme in GROUPED:
        options["group_size"] = _group_size(decoder)
    return Step(method=method, targets=targets, options=options)


def _group_size(decoder: DecoderConfig) -> int:
    inputs = sorted({columns for _, columns in linear_shapes(decoder).values()})
    for size in _GROUP_SIZES:
        if all(features % size == 0 for features in inputs):
            return size
    raise ConfigError(
        f"`schemes` asks for weights by group, and no group size of {_GROUP_SIZES} divides all of "
        f"this model's widths {tuple(inputs)}. Leave {', '.join(GROUPED)} out of `schemes`."
    )


def _where(groups: Sequence[Group]) -> str:
    blocks: dict[str, list[int]] = {}
    for group in groups:
        blocks.setdefault(group.part, []).extend(range(group.first, group.stop))
    return ", ".join(f"{part} {_ranges(numbers)}" for part, numbers in blocks.items())


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "+".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
