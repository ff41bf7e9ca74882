"""One trial of a search, in this process: what is measured for a recipe."""

from pathlib import Path

import pytest
from tiny_training import write_random_data

from cluster.storage import staged_directory
from jobs.config import DecoderConfig, Recipe, Workload
from jobs.models.decoder import build, save
from jobs.search.trial import TrialSpec, run_trial

DECODER = DecoderConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    max_seq_len=48,
    initializer_range=0.2,
)
INT8_CACHE = Recipe(kv_cache="int8")


def test_trial_when_only_the_cache_is_int8_measures_its_rounding(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "base", {"kind": "model"}) as staging:
        save(build(DECODER, seed=0), staging)
    write_random_data(tmp_path / "data", vocab_size=128, num_tokens=1000)
    spec = TrialSpec(
        stage="rung",
        workload=Workload(),
        model=tmp_path / "base",
        data=tmp_path / "data",
        recipe=Recipe(),
        split="test",
        num_sequences=8,
        seq_len=32,
        seed=0,
    )
    plain = run_trial(spec)
    rounded = run_trial(spec.replace(recipe=INT8_CACHE))
    packed = run_trial(spec.replace(recipe=INT8_CACHE, packed=tmp_path / "packed"))
    assert plain.error is rounded.error is packed.error is None
    assert rounded.losses != pytest.approx(plain.losses, abs=1e-5)
    # Packed, products are the kernels', and weights bfloat16 as the base was written.
    assert packed.losses == pytest.approx(rounded.losses, abs=2e-3)
    assert (tmp_path / "packed" / "config.json").is_file()
    assert rounded.size_bytes == plain.size_bytes
