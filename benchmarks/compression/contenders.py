"""The recipes whose quality is measured, by name, and how each is computed.

Takes nothing; gives one table. Methods have their default options but for `naive`, which is
round-to-nearest as papers have it: scales from the largest weight.
"""

from dataclasses import dataclass
from typing import Any

from jobs.config import Recipe, Step

DENSE = "dense"
BITS = ("w4", "w3")
PATTERNS: dict[str, dict[str, Any]] = {
    "unstructured": {"sparsity": 0.5},
    "2:4": {"pattern": "2:4"},
}
GROUP_SIZE = 128
_PRUNING = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class Contender:
    """A recipe; `is_served`: computed by the operators that serve it, from its files.

    Else its weights are, in the dense model, as its files would hold them: what is not quantized
    rounded to bfloat16. That is the whole effect of formats that leave activations alone.
    """

    recipe: Recipe
    is_served: bool = False

    def document(self) -> dict[str, Any]:
        """Return what decides its losses."""
        return {"recipe": self.recipe.model_dump(mode="json"), "is_served": self.is_served}


def recipe_of(*steps: tuple[str, dict[str, Any]]) -> Recipe:
    """Return a recipe of methods and their options, for all linear layers of the blocks."""
    return Recipe(steps=tuple(Step(method=method, options=options) for method, options in steps))


W8A8 = recipe_of(("rtn", {"scheme": "w8a8"}))


def _quantized(bits: str) -> dict[str, Contender]:
    format_ = {"scheme": f"{bits}a16", "group_size": GROUP_SIZE}
    recipes = {
        "naive": recipe_of(("rtn", {**format_, "observer": "minmax"})),
        "rtn": recipe_of(("rtn", format_)),
        "gptq": recipe_of(("gptq", format_)),
        "awq": recipe_of(("awq", {}), ("rtn", format_)),
        "awq_gptq": recipe_of(("awq", {}), ("gptq", format_)),
    }
    return {f"{name}-{bits}": Contender(recipe) for name, recipe in recipes.items()}


def _pruned(name: str) -> dict[str, Contender]:
    return {
        f"{method}-{name}": Contender(recipe_of((method, PATTERNS[name]))) for method in _PRUNING
    }


CONTENDERS: dict[str, Contender] = {
    DENSE: Contender(Recipe()),
    "int8_weight": Contender(recipe_of(("rtn", {"scheme": "w8a16", "group_size": None}))),
    "w8a8": Contender(W8A8, is_served=True),
    "w8a8_smoothquant": Contender(
        recipe_of(("smoothquant", {}), ("rtn", {"scheme": "w8a8"})), is_served=True
    ),
    **{name: found for bits in BITS for name, found in _quantized(bits).items()},
    **{name: found for pattern in PATTERNS for name, found in _pruned(pattern).items()},
    "magnitude_rows-unstructured": Contender(
        recipe_of(("magnitude", {**PATTERNS["unstructured"], "among": "row"}))
    ),
}
