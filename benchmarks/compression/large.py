"""A model of more than 1 GB in bfloat16, of random weights, in every format that is measured.

Takes nothing; gives directories under .bench/models/, made once, in about 4 GB of memory. The head
is quantized, too. Random weights cost what trained ones cost.
"""

from pathlib import Path
from typing import Any

from benchmarks.serving.models import Models
from jobs.config import DecoderConfig, Recipe, Step

SHAPE = DecoderConfig(
    vocab_size=32_768,
    hidden_size=1536,
    intermediate_size=6144,
    num_layers=15,
    num_heads=24,
    num_kv_heads=6,
    max_seq_len=2048,
)
DENSE = "dense"
_ALL = ("*", "lm_head")


def _rounded(*parts: tuple[tuple[str, ...], dict[str, Any]]) -> Recipe:
    """Return a recipe that rounds layers to formats, with scales that take no search."""
    return Recipe(
        steps=tuple(
            Step(method="rtn", targets=targets, options={**options, "observer": "minmax"})
            for targets, options in parts
        )
    )


FORMATS: dict[str, Recipe] = {
    "w8a8": _rounded((_ALL, {"scheme": "w8a8"})),
    "w8a16-g128": _rounded((_ALL, {"scheme": "w8a16", "group_size": 128})),
    "w4a16-g128": _rounded((_ALL, {"scheme": "w4a16", "group_size": 128})),
    "w4a16-g64": _rounded((_ALL, {"scheme": "w4a16", "group_size": 64})),
    "w4a8-g128": _rounded((_ALL, {"scheme": "w4a8", "group_size": 128})),
    "w3a16-g128": _rounded((_ALL, {"scheme": "w3a16", "group_size": 128})),
    "mixed-w8a8-w4a16": _rounded(
        (("*self_attn*", "lm_head"), {"scheme": "w8a8"}),
        (("*mlp*",), {"scheme": "w4a16", "group_size": 128}),
    ),
}


def directory(name: str, shape: DecoderConfig = SHAPE) -> Path:
    """Return the directory of a format, or the dense one."""
    models = Models(shape, has_tokenizer=False)
    return models.dense() if name == DENSE else models.applied(name, FORMATS[name])
