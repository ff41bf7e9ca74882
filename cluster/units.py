"""Estimates with a range, and quantities in words: bytes, hours, dollars."""

from collections.abc import Callable

from pydantic import Field

from cluster.config import StrictModel
from cluster.storage import GIB, KIB, MIB


class Band(StrictModel):
    """An estimate with the range that is usual."""

    low: float = Field(ge=0, description="When all goes well.")
    typical: float = Field(ge=0, description="What to expect.")
    high: float = Field(ge=0, description="When little goes well.")

    def scaled(self, factor: float) -> "Band":
        """Return the band times a factor."""
        return Band(low=self.low * factor, typical=self.typical * factor, high=self.high * factor)


def format_bytes(count: float) -> str:
    """Return bytes in a readable unit."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def format_hours(hours: float) -> str:
    """Return a duration in a readable unit."""
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def format_usd(usd: float) -> str:
    """Return dollars with as many digits as mean something."""
    return f"${usd:,.2f}" if usd >= 1 else f"${usd:.2g}"


def format_band(band: Band, show: Callable[[float], str]) -> str:
    """Return a band as its typical value and its range."""
    return f"{show(band.typical)} ({show(band.low)} to {show(band.high)})"
