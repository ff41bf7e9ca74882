import pytest

from serving.engines.vllm.cpu import why_not

OLD, CLIENT, SERVER = {"avx2"}, {"avx2", "avx_vnni"}, {"avx2", "avx512f", "avx512_vnni"}


@pytest.mark.parametrize(
    ("schemes", "flags", "words"),
    [
        ({"bf16", "w8a8"}, OLD, "overflow on a CPU without VNNI"),
        ({"w8a8"}, {"avx2", "avx512f"}, "overflow on a CPU without VNNI"),
        ({"w4a16"}, CLIENT, "4-bit weights"),
    ],
)
def test_why_not_when_the_cpu_lacks_what_a_format_needs_says_what(schemes, flags, words):
    assert words in why_not(schemes, flags)


@pytest.mark.parametrize(
    ("schemes", "flags"),
    [({"bf16", "fp8"}, OLD), ({"w8a8"}, CLIENT), ({"w8a8", "w4a16"}, SERVER)],
)
def test_why_not_when_the_cpu_has_it_is_none(schemes, flags):
    assert why_not(schemes, flags) is None
