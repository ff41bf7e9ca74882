"""HTML pages that need no network, from the templates beside this file.

Takes a template's name and values; gives a page. It does not know what pages show.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2


def render(template: str, **values: Any) -> bytes:
    """Return a page; what is put in is escaped unless the template says otherwise."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    )
    return environment.get_template(template).render(**values).encode()


def in_order(trials: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return a search's trials as tables show them: those that came farthest first, by size."""
    return sorted(trials, key=lambda t: (-t["rung"], t["size_ratio"] or math.inf))
