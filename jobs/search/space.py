"""The recipes a search tries: one choice of format and sparsity for every group of layers.

Takes a SearchConfig and the shape of a decoder; gives distinct recipes in the order they are worth
trying. Pure: it does not know how a recipe is applied or scored.

A group is the attention or the MLP of `layers_per_group` consecutive blocks, because kernels fuse
q, k and v, and gate and up: they share a choice.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from cluster.errors import ConfigError
from jobs.compression.recipe import predicted_bytes
from jobs.config import DecoderConfig, Recipe, SearchConfig, Step
from jobs.kernels.formats import GROUPED

_PARTS = ("self_attn", "mlp")
_GROUP_SIZES = (128, 64, 32)
_DENSE = "bf16"
_RANDOM_TRIES = 50
_GROUP_TARGET = re.compile(r"model\.layers\.(?P<block>\d+)\.(?P<part>\w+)\.\*")


@dataclass(frozen=True, order=True)
class Group:
    """Layers that share a choice: one part of the blocks [first, stop)."""

    part: str
    first: int
    stop: int

    @property
    def targets(self) -> tuple[str, ...]:
        """Patterns over the names of this group's linear layers."""
        return tuple(
            f"model.layers.{block}.{self.part}.*" for block in range(self.first, self.stop)
        )


@dataclass(frozen=True, order=True)
class Choice:
    """What is done to a group."""

    scheme: str
    sparsity: float


Assignment = Mapping[Group, Choice]


def proposals(config: SearchConfig, decoder: DecoderConfig) -> list[Recipe]:
    """Return at most `num_trials` distinct recipes; the same seed gives the same list.

    First every uniform recipe; then those that can meet the size limit: uniform ones with one part
    of all blocks changed, with one group changed, and random mixtures; then the same kinds beyond
    the limit, which show what quality the bytes would buy. Fewer come back if the space is smaller.
    """
    groups = layer_groups(decoder, config.layers_per_group)
    choices = sorted({Choice(s, p) for s, p in product(config.schemes, config.sparsities)})
    generator = random.Random(config.seed)
    sizes = _Sizes(decoder)
    limit_bytes = config.gate.max_size_ratio * sizes.base_bytes
    recipes: list[Recipe] = []
    beyond: list[Recipe] = []
    for index, assignment in enumerate(_assignments(groups, choices, generator, config)):
        if len(recipes) >= config.num_trials:
            break
        recipe = build_recipe(assignment, decoder)
        if recipe in recipes or recipe in beyond:
            continue
        is_uniform = index < len(choices)
        fits = is_uniform or sizes.of(assignment) <= limit_bytes
        (recipes if fits else beyond).append(recipe)
    return (recipes + beyond)[: config.num_trials]


def layer_groups(decoder: DecoderConfig, layers_per_group: int) -> list[Group]:
    """Return the groups of a decoder, in order of the blocks."""
    return [
        Group(part, first, min(first + layers_per_group, decoder.num_layers))
        for first in range(0, decoder.num_layers, layers_per_group)
        for part in _PARTS
    ]


def build_recipe(assignment: Assignment, decoder: DecoderConfig) -> Recipe:
    """Return the recipe that carries out an assignment: pruning first, then quantization.

    Groups of equal choice share a step, and a step that covers all groups targets `*`.
    """
    steps: list[Step] = []
    for sparsity in sorted({choice.sparsity for choice in assignment.values()} - {0.0}):
        chosen = [group for group in assignment if assignment[group].sparsity == sparsity]
        targets = _targets(chosen, assignment)
        steps.append(Step(method="magnitude", targets=targets, options={"sparsity": sparsity}))
    for scheme in sorted({choice.scheme for choice in assignment.values()} - {_DENSE}):
        chosen = [group for group in assignment if assignment[group].scheme == scheme]
        steps.append(_quantize(scheme, _targets(chosen, assignment), decoder))
    return Recipe(steps=tuple(steps))


def describe(recipe: Recipe) -> str:
    """Return a short text for tables: what is done to which part of which blocks."""
    parts = [f"{_describe_options(step)} {_describe_targets(step)}" for step in recipe.steps]
    if recipe.kv_cache != "auto":
        parts.append(f"{recipe.kv_cache} cache")
    return "; ".join(parts) or _DENSE


class _Sizes:
    """Bytes of assignments, as a sum over groups: blocks are alike, so few need to be asked for."""

    def __init__(self, decoder: DecoderConfig) -> None:
        self.base_bytes = predicted_bytes(decoder, Recipe())
        self._decoder = decoder
        self._saved: dict[tuple[str, int, str], int] = {}

    def of(self, assignment: Assignment) -> int:
        """Return the bytes of all weights under an assignment."""
        saved = (self._saved_bytes(group, choice.scheme) for group, choice in assignment.items())
        return self.base_bytes - sum(saved)

    def _saved_bytes(self, group: Group, scheme: str) -> int:
        if scheme == _DENSE:
            return 0
        key = (group.part, group.stop - group.first, scheme)
        if key not in self._saved:
            step = _quantize(scheme, group.targets, self._decoder)
            alone = predicted_bytes(self._decoder, Recipe(steps=(step,)))
            self._saved[key] = self.base_bytes - alone
        return self._saved[key]


def _assignments(
    groups: list[Group],
    choices: list[Choice],
    generator: random.Random,
    config: SearchConfig,
) -> Iterator[Assignment]:
    for choice in choices:
        yield dict.fromkeys(groups, choice)
    if len(choices) < 2:
        return
    swaps = [(base, other) for base in choices for other in choices if base != other]
    for (base, other), part in product(swaps, _PARTS):
        yield {group: other if group.part == part else base for group in groups}
    singles = list(product(swaps, groups))
    generator.shuffle(singles)
    for (base, other), changed in singles:
        yield {group: other if group == changed else base for group in groups}
    for _ in range(_RANDOM_TRIES * config.num_trials):
        yield {group: generator.choice(choices) for group in groups}


def _quantize(scheme: str, targets: tuple[str, ...], decoder: DecoderConfig) -> Step:
    options: dict[str, object] = {"scheme": scheme}
    if scheme in GROUPED:
        options["group_size"] = _group_size(decoder)
    return Step(method="rtn", targets=targets, options=options)


def _targets(chosen: list[Group], assignment: Assignment) -> tuple[str, ...]:
    if len(chosen) == len(assignment):
        return ("*",)
    return tuple(target for group in sorted(chosen) for target in group.targets)


def _group_size(decoder: DecoderConfig) -> int:
    inputs = (
        decoder.hidden_size,
        decoder.intermediate_size,
        decoder.num_heads * decoder.resolved_head_dim,
    )
    for size in _GROUP_SIZES:
        if all(features % size == 0 for features in inputs):
            return size
    raise ConfigError(
        f"`schemes` asks for weights by group, and no group size of {_GROUP_SIZES} divides all of "
        f"this model's widths {inputs}. Leave {', '.join(GROUPED)} out of `schemes`."
    )


def _describe_options(step: Step) -> str:
    if step.method == "magnitude":
        return f"prune {step.options['sparsity']:.0%}"
    return str(step.options.get("scheme", step.method))


def _describe_targets(step: Step) -> str:
    if step.targets == ("*",):
        return "all"
    blocks: dict[str, list[int]] = {}
    for target in step.targets:
        found = _GROUP_TARGET.fullmatch(target)
        if found is None:
            return ", ".join(step.targets)
        blocks.setdefault(found["part"], []).append(int(found["block"]))
    return ", ".join(f"{part} {_ranges(numbers)}" for part, numbers in blocks.items())


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "+".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
