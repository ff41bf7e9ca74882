"""The compiled C++ kernels, as functions that take pointers.

Takes nothing; gives the loaded library, built first where it is missing, and the small things that
every binding needs. It does not know what a kernel computes: bindings live beside their operators.

A binding declares its function once and passes addresses, sizes in elements, and the number of
threads last:

    _norm = native.function("rs_rms_norm", "ppnnnfi")
    _norm(native.address(x), native.address(y), rows, columns, stride, eps, native.num_threads())

Every tensor passed must be contiguous where the kernel takes no stride, and must outlive the call.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cluster.errors import EngineError, RaysmithError
from jobs.kernels import build

_logger = logging.getLogger(__name__)
# p address, n size or stride in elements, i int32, f float32
_TYPES = {
    "p": ctypes.c_void_p,
    "n": ctypes.c_int64,
    "i": ctypes.c_int32,
    "f": ctypes.c_float,
}


class WeightLayout(NamedTuple):
    """How the library reads packed weights, which depends on the CPU (see csrc/linear*.cpp)."""

    block: int  # outputs that lie together
    int8_inputs: int  # of one output that lie together, in int8
    int8_offset: int  # added to int8 weights


def why_unavailable() -> str | None:
    """Return why the kernels cannot be used in this process, or None; builds them if missing.

    Raises EngineError if `RAYSMITH_KERNELS` names no instruction set.
    """
    return _load().reason


def is_available() -> bool:
    """Return whether the kernels can be used in this process, as `why_unavailable` says it."""
    return _load().reason is None


def instruction_set() -> str | None:
    """Return what the library is compiled for, "avx512" or "avx2"; None without a library."""
    return _load().instruction_set


def library_name() -> str:
    """Return the loaded library's file name, which changes with its sources, compiler and CPU."""
    return str(_library()._name).rpartition("/")[2]


@functools.cache
def weight_layout() -> WeightLayout:
    """Return how weights must be packed. Raises EngineError where the library is not available."""
    found = torch.zeros(3, dtype=torch.int64)
    function("rs_weight_layout", "p")(address(found))
    return WeightLayout(*found.tolist())


@functools.cache
def has_amx() -> bool:
    """Return whether products of several int8 rows run on AMX; `RAYSMITH_AMX=0` says no.

    The bits are the same either way. Raises EngineError where the library is not available.
    """
    found = torch.zeros(1, dtype=torch.int32)
    function("rs_has_amx", "p")(address(found))
    return bool(found)


def function(name: str, signature: str) -> Callable[..., None]:
    """Return a kernel by name; `signature` holds a letter per argument: p, n, i or f.

    The library is loaded by the first call. Raises EngineError where it is not available.
    """
    types = [_TYPES[letter] for letter in signature]

    @functools.cache
    def resolve() -> Callable[..., None]:
        found = getattr(_library(), name)
        found.argtypes = types
        found.restype = None
        return found

    def call(*arguments: object) -> None:
        resolve()(*arguments)

    return call


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor's first element lies; None (a null pointer) for no tensor."""
    return None if tensor is None else tensor.data_ptr()


def num_threads() -> int:
    """Return how many threads a kernel may use: as many as torch's operators."""
    return torch.get_num_threads()


def _library() -> ctypes.CDLL:
    loaded = _load()
    if loaded.library is None:
        raise EngineError(f"the C++ kernels are not available: {loaded.reason}.")
    return loaded.library


class _Loaded(NamedTuple):
    """A library and what it is compiled for, or why there is none."""

    library: ctypes.CDLL | None = None
    instruction_set: str | None = None
    reason: str | None = None


@functools.cache
def _load() -> _Loaded:
    """Load the library once a process; the reason is logged once, here."""
    chosen, reason = build.instruction_set(), build.why_impossible()
    if chosen is not None and reason is None:
        try:
            # torch, imported above, has loaded the OpenMP runtime that this library calls.
            return _Loaded(ctypes.CDLL(str(build.build())), chosen.name)
        except (RaysmithError, OSError) as error:
            reason = str(error)
    _logger.warning("C++ kernels are not used, PyTorch's operators are: %s", reason)
    return _Loaded(reason=reason)
