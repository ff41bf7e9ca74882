"""What a compression method offers: options, the format it leads to, and its work on one layer.

Adding a method is adding a file beside this one with these three names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from cluster.config import StrictModel
from jobs.kernels.formats import Layout, QuantizedWeight


@dataclass(frozen=True)
class LayerResult:
    """What a method made of one layer: its weight, and the integers if it is quantized."""

    weight_OI: Tensor  # noqa: N815
    quantized: QuantizedWeight | None = None


class Method(Protocol):
    """A plug-in: `Options`, `layout(options)` and `apply(weight_OI, options)`.

    `layout` is the format a layer has afterwards, or None if the method leaves it as it is
    (pruning). `apply` takes a float32 weight, never changes it in place, and gives a LayerResult
    whose weight is what the compressed form stands for.
    """

    Options: type[StrictModel]
    layout: Callable[[Any], Layout | None]
    apply: Callable[[Tensor, Any], LayerResult]
