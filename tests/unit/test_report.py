import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from jobs import plots
from jobs.report import DemoFacts, rows, write_report


@pytest.fixture
def facts(tmp_path: Path) -> DemoFacts:
    train, search = tmp_path / "train", tmp_path / "search"
    train.mkdir()
    search.mkdir()
    records = [{"step": i, "loss": 8 - i} for i in range(3)] + [{"step": 2, "validation_loss": 4.5}]
    (train / "metrics.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    (train / "summary.json").write_text(json.dumps({"validation_loss": 4.5}))
    (train / "model").mkdir()
    (train / "model" / "config.json").write_text(json.dumps({"vocab_size": 4096}))
    numbers = {
        "base_perplexity": 90.0,
        "perplexity": 91.0,
        "perplexity_increase": 0.0111,
        "perplexity_increase_upper95": 0.0133,
        "base_size_bytes": 10_000_000,
        "size_bytes": 4_000_000,
        "base_latency_ms": 2.0,
        "latency_ms": 1.0,
        "max_size_ratio": 0.45,
        "max_perplexity_increase": 0.02,
    }
    trial = {
        "candidate": 1,
        "summary": "w4a16 <all>",
        "rung": 1,
        "size_ratio": 0.4,
        "perplexity_increase": 0.0111,
        "perplexity_increase_lower95": 0.0091,
        "perplexity_increase_upper95": 0.0133,
        "latency_ms": 1.0,
        "served_ms": 6.0,
        "predicted_served_ms": 5.5,
        "base_served_ms": 9.0,
        "seconds": 3.0,
        "on_front": True,
        "error": None,
    }
    broken = {**trial, "candidate": 2, "rung": 0, "on_front": False, "error": "no such layer"}
    broken |= {"size_ratio": None, "perplexity_increase": None, "latency_ms": None}
    broken["perplexity_increase_upper95"] = None
    (search / "search.json").write_text(
        json.dumps(
            {
                "verdict": {"numbers": numbers},
                "trials": [trial, broken],
                "winner": 1,
                "why": "the smallest that passed",
            }
        )
    )
    return DemoFacts(
        reference="tiny@1",
        completion="def read_<file>():",
        first_token_ms=12.0,
        stream_tokens_per_s=100.0,
        parity_equal=50,
        parity_prompts=50,
        stage_seconds={"train": 60.0},
        train_dir=str(train),
        search_dir=str(search),
        total_s=123.0,
    )


def test_rows_from_the_runs_files_state_what_was_measured(facts: DemoFacts):
    by_name = {row.what: row for row in rows(facts)}
    loss = by_name["validation loss, nats per token"]
    assert f"{4.5 / math.log(4096) - 1:+.1%}" in loss.after
    assert "40.0%" in by_name["weights on disk"].after
    assert by_name["greedy answers equal to offline"].after == "50 of 50 prompts"


def test_write_report_escapes_text_and_draws_four_plots(facts: DemoFacts, tmp_path: Path):
    page = write_report(tmp_path, facts).read_text(encoding="utf-8")
    assert "def read_&lt;file&gt;():" in page
    assert "w4a16 &lt;all&gt;" in page
    assert "no such layer" in page
    assert page.count("<svg") == 4


def test_plots_are_well_formed_and_reproducible():
    def draw() -> str:
        return plots.bars("Size", ["bf16", "published"], [10.0, 4.0], unit="MiB")

    assert ET.fromstring(draw()).tag.endswith("svg")
    assert draw() == draw()
