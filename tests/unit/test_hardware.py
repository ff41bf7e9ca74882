import pytest

from cluster.errors import ConfigError, PlacementError
from cluster.hardware import classify_cpu, detect_cpu, load_catalogue, peak_flops

REQUIRED = ["A100", "H100", "H200", "B200", "L4", "L40S", "T4", "RTX 4090"]
REQUIRED += ["TPU v5e", "TPU v5p", "TPU v6e"]


@pytest.mark.parametrize("name", REQUIRED)
def test_catalogue_entry_has_prices_and_dated_sources(name: str) -> None:
    entry = load_catalogue().find(name)
    price = entry.price_usd_per_h
    assert price.on_demand is not None
    assert price.spot is not None
    assert 0 < price.spot < price.on_demand
    assert entry.memory_bytes is not None
    assert len({source.date for source in entry.sources}) >= 1
    assert any("spot" in source.what for source in entry.sources)


def test_catalogue_every_name_and_alias_finds_its_own_entry() -> None:
    entries = load_catalogue().accelerators
    owners = [(name, entry) for entry in entries for name in {entry.name, *entry.aliases}]
    assert all(load_catalogue().find(name) is entry for name, entry in owners)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100-40G"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40S", "L40S"),
        ("TPU-V6E", "TPU v6e"),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_match_when_given_a_drivers_name_finds_the_device(device: str, name: str | None) -> None:
    found = load_catalogue().match(device)
    assert (found.name if found else None) == name


def test_find_when_unknown_lists_and_suggests() -> None:
    with pytest.raises(ConfigError, match=r"no accelerator `H10`.*Did you mean `H100`\?"):
        load_catalogue().find("H10")


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("sse2", "cpu-generic"),
        ("avx2 fma", "cpu-avx2"),
        ("avx2 fma avx512f avx512bw", "cpu-avx512"),
        ("avx2 fma avx512f avx512bw avx512_bf16 avx512_vnni", "cpu-avx512-bf16"),
        ("avx512f avx512_bf16 avx512_vnni amx_tile amx_bf16 amx_int8", "cpu-amx"),
        ("asimd", "cpu-neon"),
        ("asimd sve bf16 i8mm", "cpu-sve"),
    ],
)
def test_classify_cpu_takes_the_best_that_flags_allow(flags: str, name: str) -> None:
    assert classify_cpu(flags.split()) == name
    assert load_catalogue().find(name).kind == "cpu"


def test_detect_cpu_scales_the_entry_to_this_machines_clock() -> None:
    core = detect_cpu()
    entry = load_catalogue().find(core.name)
    assert core.clock_ghz is not None
    assert entry.clock_ghz is not None
    expected = entry.tflops["fp32"] * core.clock_ghz / entry.clock_ghz
    assert core.tflops["fp32"] == pytest.approx(expected)


def test_peak_flops_multiplies_by_the_number_of_devices() -> None:
    assert peak_flops(load_catalogue().find("H100"), "bf16", 4) == pytest.approx(4 * 989e12)


def test_peak_flops_when_precision_is_not_computed_says_what_is() -> None:
    with pytest.raises(PlacementError, match=r"T4 does not compute in bf16; it has fp32"):
        peak_flops(load_catalogue().find("T4"), "bf16")
