"""Weights in blocks of outputs, as the C++ kernels read them, and calls that share that form.

Takes weights; gives packed bytes (the layouts are described in csrc/linear*), and the whole
`run` of an operator from the part that writes in place. It does not know how products are made.

O outputs, padded to K blocks of E (32 with AVX-512, 16 with AVX2); I inputs; N rows
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from jobs.kernels import native
from jobs.kernels.formats import Scheme
from jobs.kernels.memory import resident
from jobs.kernels.operator import InPlace, Operator, Packed, Problem, Weight
from jobs.kernels.rows import QuantizedRows, quantize

NAME = "cpp"  # of the operators of every format that run on these kernels


def refuses(problem: Problem, *, group_multiple: int = 1) -> str | None:
    """Return why the C++ kernels cannot run a problem, or None."""
    if problem.device.type != "cpu":
        return "it runs on CPUs only"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes float32 and bfloat16, not {problem.dtype}"
    group_size = problem.layout.group_size
    if group_size is not None and group_size % group_multiple:
        return f"it takes groups that are multiples of {group_multiple}, not {group_size}"
    return native.why_unavailable()


def pad_outputs(weight_OI: Tensor) -> Tensor:
    """Return a weight with rows of zeros added up to whole blocks."""
    return functional.pad(weight_OI, (0, 0, 0, -weight_OI.shape[0] % native.weight_layout().block))


def interleave(weight_OI: Tensor, inputs: int) -> Tensor:
    """Return a weight, padded before, as [K, I * E]: `inputs` of an output, then the next output's.

    `inputs` must divide I.
    """
    block = native.weight_layout().block
    by_block_KEGI = weight_OI.unflatten(1, (-1, inputs)).unflatten(0, (-1, block))
    return by_block_KEGI.transpose(1, 2).flatten(1)


def by_group(bytes_KI: Tensor, scale_OG: Tensor) -> Packed:
    """Return interleaved weights, each group's behind its scales; see csrc/linear_groups.h."""
    lanes = native.weight_layout().block // 2
    scale_OG = pad_outputs(scale_OG.to(torch.bfloat16))
    scale_KGE2 = scale_OG.unflatten(0, (-1, 2, lanes)).permute(0, 3, 2, 1).contiguous()
    scale_KGB = scale_KGE2.flatten(2).view(torch.uint8)
    packed_KGB = torch.cat([scale_KGB, bytes_KI.unflatten(1, (scale_OG.shape[1], -1))], dim=2)
    return (resident(packed_KGB.flatten(1)),)


def join(parts: list[Packed], outputs: list[int]) -> Packed | None:
    """Return packed weights of several layers as those of one; None if a block would be shared."""
    if any(count % native.weight_layout().block for count in outputs[:-1]):
        return None
    return tuple(resident(torch.cat(tensors)) for tensors in zip(*parts, strict=True))


def part(parts: list[Packed], number: int, joined: Packed) -> Packed:
    """Return the part of joined weights that one of the layers is, sharing memory."""
    found = []
    for place, tensor in enumerate(joined):
        first = sum(packed[place].shape[0] for packed in parts[:number])
        found.append(tensor[first : first + parts[number][place].shape[0]])
    return tuple(found)


def in_place(name: str, signature: str, *, takes_int8: bool) -> InPlace:
    """Return the in-place form of a kernel by name, whose arguments are those of csrc/products.h.

    They are the rows (of int8: values, scales, sums), the packed tensors, bias and results; the
    numbers of rows, inputs and outputs, and the group size of a format that has groups; how far
    rows lie apart, where they are floats, and results; whether to add; the number of threads.
    """
    kernel = native.function(name, signature)

    def multiply(
        x: Tensor | QuantizedRows,
        packed: Packed,
        bias_O: Tensor | None,
        y_NO: Tensor,
        problem: Problem,
        accumulate: bool,  # noqa: FBT001 - as InPlace.multiply declares
    ) -> None:
        tensors: tuple[Tensor | None, ...]
        sizes: tuple[int, ...]
        if takes_int8:
            assert isinstance(x, QuantizedRows), "this operator takes quantized rows"
            tensors = (x.values_NS, x.scale_N, x.sums_NB, *packed, bias_O, y_NO)
            sizes = (x.rows, *problem.sizes)
        else:
            assert isinstance(x, Tensor), "this operator takes float32 rows"
            tensors = (x, *packed, bias_O, y_NO)
            sizes = (x.shape[0], *problem.sizes, x.stride(0))
        addresses = map(native.address, tensors)
        kernel(*addresses, *sizes, y_NO.stride(0), accumulate, native.num_threads())

    return InPlace(takes_int8, multiply)


def run(
    x_NI: Tensor, packed: Packed, bias_O: Tensor | None, problem: Problem, *, in_place: InPlace
) -> Tensor:
    """Return y_NO in x's dtype by an operator that writes in place."""
    x_NI = x_NI.float()
    if x_NI.stride(-1) != 1:
        x_NI = x_NI.contiguous()
    y_NO = torch.empty((x_NI.shape[0], problem.out_features))
    bias_O = None if bias_O is None else bias_O.float()
    rows: Tensor | QuantizedRows = quantize(x_NI) if in_place.takes_int8 else x_NI
    in_place.multiply(rows, packed, bias_O, y_NO, problem, False)
    return y_NO.to(problem.dtype)


def operator(
    scheme: Scheme,
    refuses: Callable[[Problem], str | None],
    pack: Callable[[Weight, Problem], Packed],
    in_place: InPlace,
) -> Operator:
    """Return an operator that runs by its in-place form."""
    return Operator(
        NAME,
        scheme,
        refuses,
        pack,
        functools.partial(run, in_place=in_place),
        in_place,
        has_exact_rows=True,
    )
