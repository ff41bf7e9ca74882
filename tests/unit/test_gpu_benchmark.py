"""The benchmark of GPUs, run on a CPU: the code is the same, and the report says where it ran."""

import json

import pytest
import torch

from benchmarks.gpu.serving import FORMATS, PEER, main


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_benchmark_when_run_on_cpu_reports_every_contender_and_says_so(tmp_path, capsys):
    out = tmp_path / "out.json"
    options = ["--device", "cpu", "--shape", "tiny", "--rounds", "1", "--json", str(out)]
    assert main([*options, "--batches", "1", "3"]) == 0, capsys.readouterr().err
    document = json.loads(out.read_text())
    assert document["config"]["device"] == "cpu"
    assert document["bandwidth_bytes_per_s"] is None
    assert list(document["engines"]) == [*(f"raysmith {scheme}" for scheme in FORMATS), PEER]
    for name, engine in document["engines"].items():
        assert list(engine["batches"]) == ["1", "3"]
        assert all(found["tokens_per_s"] > 0 for found in engine["batches"].values())
        assert all(found["share_of_floor"] is None for found in engine["batches"].values())
        assert name == PEER or engine["check"]["is_equal_to_the_bit"]
        assert name == PEER or engine["check"]["difference_to_plain_pass"] < 0.01
    engines = document["engines"]
    sizes = [engines[f"raysmith {scheme}"]["weight_bytes_per_pass"] for scheme in FORMATS]
    assert sizes == sorted(sizes, reverse=True)
    assert document["ratios"]["raysmith bf16"].keys() == {"1", "3"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_benchmark_when_there_is_no_gpu_ends_with_an_error(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main(["--json", str(out)]) != 0
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not out.exists()
