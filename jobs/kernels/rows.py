"""Rows of activations in int8, in the form that the C++ kernels read and write.

Takes float rows; gives QuantizedRows, or fills those that were made before. What is stored equals
formats.quantize_rows. The layout is that of csrc/quantize.h.

N rows, I inputs, S inputs padded to a multiple of 64, B = S / 32 blocks that share a sum
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.kernels import native

_INPUT_BLOCK = 64
_SUM_BLOCK = 32
_quantize = native.function("rs_quantize_rows", "ppppnnni")


@dataclass(frozen=True)
class QuantizedRows:
    """`values_NS * scale_N` is about the rows; `sums_NB` are sums of values, used by kernels."""

    values_NS: Tensor  # noqa: N815
    scale_N: Tensor  # noqa: N815
    sums_NB: Tensor  # noqa: N815

    @classmethod
    def empty(cls, rows: int, inputs: int) -> "QuantizedRows":
        """Return room for `rows` rows, to be filled by a kernel."""
        padded = padded_inputs(inputs)
        return cls(
            torch.empty((rows, padded), dtype=torch.int8),
            torch.empty(rows),
            torch.empty((rows, padded // _SUM_BLOCK), dtype=torch.int32),
        )

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.values_NS.shape[0]

    def first(self, rows: int) -> "QuantizedRows":
        """Return the first rows, sharing memory."""
        return QuantizedRows(self.values_NS[:rows], self.scale_N[:rows], self.sums_NB[:rows])


def padded_inputs(inputs: int) -> int:
    """Return how far apart quantized rows of `inputs` values lie, in bytes."""
    return -(-inputs // _INPUT_BLOCK) * _INPUT_BLOCK


def quantize(x_NI: Tensor, out: QuantizedRows | None = None) -> QuantizedRows:
    """Quantize float32 rows, into `out` where given; a row's values depend on that row alone."""
    assert x_NI.dtype == torch.float32, f"rows are {x_NI.dtype}, not float32"
    assert x_NI.stride(-1) == 1, "a row's values must lie side by side"
    rows, inputs = x_NI.shape
    found = QuantizedRows.empty(rows, inputs) if out is None else out
    assert found.values_NS.shape == (rows, padded_inputs(inputs)), "`out` is for other rows"
    addresses = (x_NI, found.values_NS, found.scale_N, found.sums_NB)
    _quantize(*map(native.address, addresses), rows, inputs, x_NI.stride(0), native.num_threads())
    return found
