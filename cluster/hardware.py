"""What an accelerator can do and what it costs: the catalogue in hardware.yaml, and this CPU.

Takes a name, or /proc/cpuinfo; gives an Accelerator. It does not know which machines there are
(inventory.py) or how much of a peak a job reaches (planner.py).
"""

import datetime
import difflib
import platform
import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Literal

import psutil
import yaml
from pydantic import Field

from cluster.config import StrictModel, parse_config
from cluster.errors import ConfigError, PlacementError

Precision = Literal["fp32", "bf16", "fp16", "fp8", "int8"]
CATALOGUE_PATH = Path(__file__).with_name("hardware.yaml")
# Best first: the CPU entry and the feature flags (Linux names) that it needs.
_CPU_LEVELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("cpu-amx", frozenset({"amx_tile", "amx_bf16", "amx_int8"})),
    ("cpu-avx512-bf16", frozenset({"avx512f", "avx512_bf16", "avx512_vnni"})),
    ("cpu-avx512", frozenset({"avx512f", "avx512bw"})),
    ("cpu-avx2", frozenset({"avx2", "fma"})),
    ("cpu-sve", frozenset({"sve", "bf16", "i8mm"})),
    ("cpu-neon", frozenset({"asimd"})),
)


class Source(StrictModel):
    """Where a number comes from."""

    what: str = Field(description="Which numbers.")
    source: str = Field(description="Address or title of a document.")
    date: datetime.date = Field(description="When it was published or read.")


class Price(StrictModel):
    """List price of one device, in US dollars per hour."""

    on_demand: float | None = Field(None, ge=0, description="Kept until it is given back.")
    spot: float | None = Field(None, ge=0, description="May be taken away at any time.")


class Accelerator(StrictModel):
    """One device (one core for a CPU) at its best."""

    name: str = Field(description="Name in the catalogue.")
    aliases: tuple[str, ...] = Field((), description="Other spellings, as Ray and drivers use.")
    kind: Literal["cpu", "gpu", "tpu"] = Field(description="What sort of device it is.")
    tflops: dict[Precision, float] = Field(min_length=1, description="Dense peak, 1e12 per second.")
    clock_ghz: float | None = Field(None, gt=0, description="CPU: clock that `tflops` is for.")
    memory_bytes: int | None = Field(None, gt=0, description="Device memory; none for a core.")
    bandwidth_bytes_per_s: float | None = Field(None, gt=0, description="Of device memory.")
    link_bytes_per_s: float | None = Field(None, gt=0, description="To other devices.")
    price_usd_per_h: Price = Field(Price(), description="List prices.")
    watts: float | None = Field(None, gt=0, description="Board power.")
    sources: tuple[Source, ...] = Field(min_length=1, description="Of all these numbers.")

    def at_clock(self, clock_ghz: float) -> "Accelerator":
        """Return this core at another clock: its peaks scale with it."""
        assert self.clock_ghz is not None, f"{self.name} is not a CPU"
        ratio = clock_ghz / self.clock_ghz
        scaled = {precision: peak * ratio for precision, peak in self.tflops.items()}
        return self.replace(tflops=scaled, clock_ghz=clock_ghz)


class Catalogue(StrictModel):
    """All accelerators that are known, by name."""

    accelerators: tuple[Accelerator, ...] = Field(min_length=1, description="In file order.")

    def find(self, name: str) -> Accelerator:
        """Return the accelerator of this name or alias, else raise ConfigError that lists them."""
        found = self.match(name)
        if found is not None and _spelling(name) in _spellings(found):
            return found
        names = [entry.name for entry in self.accelerators]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        raise ConfigError(
            f"no accelerator `{name}` in the catalogue; there are: {', '.join(names)}.{hint}"
        )

    def match(self, device_name: str) -> Accelerator | None:
        """Return the accelerator whose name or longest alias occurs in a driver's device name."""
        words = f"-{_spelling(device_name)}-"
        found = [
            (len(spelling), entry)
            for entry in self.accelerators
            for spelling in _spellings(entry)
            if f"-{spelling}-" in words
        ]
        return max(found, key=lambda pair: pair[0])[1] if found else None


@lru_cache(maxsize=1)
def load_catalogue() -> Catalogue:
    """Return the catalogue of hardware.yaml."""
    document = yaml.safe_load(CATALOGUE_PATH.read_text(encoding="utf-8"))
    return parse_config(Catalogue, document, str(CATALOGUE_PATH))


def peak_flops(accelerator: Accelerator, precision: Precision, count: float = 1.0) -> float:
    """Return the dense peak of `count` devices (cores) in operations per second.

    Raises PlacementError if the device has no units for this precision.
    """
    if precision not in accelerator.tflops:
        raise PlacementError(
            f"{accelerator.name} does not compute in {precision}; it has "
            f"{', '.join(accelerator.tflops)}. Set `precision`, or use other hardware."
        )
    return accelerator.tflops[precision] * 1e12 * count


def training_precision(devices: Iterable[Accelerator]) -> Literal["fp32", "bf16"]:
    """Return what `precision: auto` means: bf16 where every device multiplies it faster than fp32.

    Where a CPU has no instruction for it, autocast converts back and forth, and takes twice as long
    and more.
    """
    are_faster = all(d.tflops.get("bf16", 0.0) > d.tflops.get("fp32", 0.0) for d in devices)
    return "bf16" if are_faster else "fp32"


def detect_cpu() -> Accelerator:
    """Return one core of this machine at the clock it reports, or the catalogue's if it does not.

    Hypervisors often report the base clock, so that a share of peak may come out above what the
    hardware would say at its boost clock.
    """
    entry = load_catalogue().find(classify_cpu(_cpu_flags()))
    clock_ghz = _clock_ghz()
    return entry.at_clock(clock_ghz) if clock_ghz else entry


def classify_cpu(flags: Collection[str]) -> str:
    """Return the name of the best CPU entry that these feature flags allow."""
    have = set(flags)
    return next((name for name, need in _CPU_LEVELS if need <= have), "cpu-generic")


def _cpu_flags() -> frozenset[str]:
    path = Path("/proc/cpuinfo")
    if path.exists():
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", path.read_text(), re.MULTILINE)
        return frozenset(found.group(1).split()) if found else frozenset()
    # macOS has no /proc: Apple silicon has NEON, and Intel Macs of the last ten years AVX2.
    return frozenset({"asimd"} if platform.machine() == "arm64" else {"avx2", "fma"})


def _clock_ghz() -> float | None:
    path = Path("/proc/cpuinfo")
    if path.exists():
        clocks = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", path.read_text(), re.MULTILINE)
        if clocks:
            return max(float(clock) for clock in clocks) / 1000
    try:
        reported = psutil.cpu_freq()
    except (OSError, RuntimeError):  # not told on some platforms and in some containers
        return None
    mhz = max(reported.max, reported.current) if reported else 0.0
    return mhz / 1000 if mhz > 0 else None


def _spellings(entry: Accelerator) -> set[str]:
    return {_spelling(name) for name in (entry.name, *entry.aliases)}


def _spelling(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
