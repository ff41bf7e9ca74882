import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import losses, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import hardware
from cluster.errors import ConfigError, IntegrityError, TrainingError
from cluster.storage import verify_directory
from jobs.config import DecoderConfig, TrainConfig
from jobs.data.tokens import open_split
from jobs.models.decoder import load
from jobs.training.loop import StepMetrics, TrainOutcome, World, run
from jobs.training.metrics import flops_per_token
from jobs.training.metrics_file import read_metrics
from jobs.training.validation import validation_loss

pytestmark = pytest.mark.usefixtures("one_thread")


class _KilledError(Exception):
    pass


def _train(
    config: TrainConfig,
    data: Path,
    run_dir: Path,
    on_step: Callable[[StepMetrics], None] = lambda _: None,
) -> TrainOutcome:
    return run(config, data, run_dir, World(), on_step)


def _kill_at(step: int) -> Callable[[StepMetrics], None]:
    def on_step(metrics: StepMetrics) -> None:
        if metrics.step == step:
            raise _KilledError

    return on_step


@pytest.fixture(scope="module")
def control(tiny_corpus: str, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run_dir = tmp_path_factory.mktemp("control")
    _train(tiny_config(tiny_corpus), tiny_data, run_dir)
    torch.set_num_threads(before)
    return run_dir


def test_training_when_long_enough_learns(
    tiny_corpus: str, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_corpus, max_steps=60, optimizer={"lr": 0.01})
    outcome = _train(config, tiny_data, tmp_path)
    first = losses(tmp_path)[1]
    assert first == pytest.approx(math.log(320), abs=0.3)
    assert outcome.validation_loss < 0.6 * first
    assert outcome.tokens == 60 * 4 * 16
    assert outcome.tokens_per_s > 0
    assert 0 < outcome.mfu < 1


def test_training_when_bf16_and_fp32_are_compared_is_close(
    tiny_corpus: str, tiny_data: Path, control: Path, tmp_path: Path
) -> None:
    _train(tiny_config(tiny_corpus, precision="bf16"), tiny_data, tmp_path)
    assert list(losses(tmp_path).values()) == pytest.approx(
        list(losses(control).values()), abs=0.02
    )
    assert losses(tmp_path) != losses(control)


@pytest.mark.parametrize(
    ("cpu", "meant"), [("cpu-avx2", "fp32"), ("cpu-avx512", "fp32"), ("cpu-amx", "bf16")]
)
def test_training_when_precision_is_auto_is_what_this_cpu_is_faster_in(
    cpu: str,
    meant: str,
    tiny_corpus: str,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "detect_cpu", lambda: hardware.load_catalogue().find(cpu))
    changes = {"max_steps": 2}
    _train(tiny_config(tiny_corpus, precision="auto", **changes), tiny_data, tmp_path / "auto")
    _train(tiny_config(tiny_corpus, precision=meant, **changes), tiny_data, tmp_path / "meant")
    assert losses(tmp_path / "auto") == losses(tmp_path / "meant")


def test_training_when_accumulating_gives_the_same_losses(
    tiny_corpus: str, tiny_data: Path, control: Path, tmp_path: Path
) -> None:
    _train(tiny_config(tiny_corpus, micro_batch_size=1), tiny_data, tmp_path)
    assert list(losses(tmp_path).values()) == pytest.approx(
        list(losses(control).values()), abs=1e-5
    )


@pytest.mark.parametrize("step", [1, 3, 8, 12])
def test_training_when_stopped_and_run_again_equals_the_control_bit_for_bit(
    tiny_corpus: str, tiny_data: Path, control: Path, tmp_path: Path, step: int
) -> None:
    config = tiny_config(tiny_corpus)
    with pytest.raises(_KilledError):
        _train(config, tiny_data, tmp_path, _kill_at(step))
    outcome = _train(config, tiny_data, tmp_path)
    assert outcome.resumed_from_step == ((step - 1) // 3 * 3 or None)
    assert losses(tmp_path) == losses(control)
    ours, theirs = (load_file(path / "model/model.safetensors") for path in (tmp_path, control))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_training_when_run_again_after_the_end_changes_nothing(
    tiny_corpus: str, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_corpus)
    first = _train(config, tiny_data, tmp_path)
    manifest = (tmp_path / "model/manifest.json").read_bytes()
    again = _train(config, tiny_data, tmp_path)
    assert again.validation_loss == first.validation_loss
    assert again.train_loss == first.train_loss
    assert (tmp_path / "model/manifest.json").read_bytes() == manifest


@pytest.mark.filterwarnings("default")  # the compiler warns of itself
def test_training_when_compiled_gives_the_same_losses(
    tiny_corpus: str, tiny_data: Path, control: Path, tmp_path: Path
) -> None:
    _train(tiny_config(tiny_corpus, max_steps=6, compile=True), tiny_data, tmp_path)
    # A shorter run falls faster after its peak: compare only what came before.
    compiled, plain = losses(tmp_path), losses(control)
    assert [compiled[step] for step in (1, 2, 3)] == pytest.approx(
        [plain[step] for step in (1, 2, 3)], abs=1e-4
    )


def test_metrics_when_a_run_is_done_hold_each_step_and_validation(control: Path) -> None:
    entries = read_metrics(control)
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 13))
    assert steps[0].keys() == {"step", "loss", "lr", "grad_norm", "tokens_per_s", "mfu"}
    assert [e["step"] for e in entries if "validation_loss" in e] == [6, 12]
    events = EventAccumulator(str(control / "tensorboard"))
    events.Reload()
    recorded = [event.value for event in events.Scalars("train/loss")]
    assert recorded == pytest.approx([entry["loss"] for entry in steps], rel=1e-6)
    assert [event.step for event in events.Scalars("validation/loss")] == [6, 12]


def test_metrics_when_the_last_line_was_cut_off_leave_it_out(control: Path, tmp_path: Path) -> None:
    text = (control / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text[:-5])
    assert read_metrics(tmp_path) == read_metrics(control)[:-1]


def test_model_when_trained_loads_in_transformers_with_its_tokenizer(
    control: Path, tiny_data: Path
) -> None:
    verify_directory(control / "model")
    model = AutoModelForCausalLM.from_pretrained(str(control / "model"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(control / "model"))
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    assert tokenizer.encode("def")[0] == 0
    split = open_split(tiny_data, "validation")
    rows = torch.from_numpy(split.sequences(range(split.num_sequences(16)), 16))
    with torch.no_grad():
        loss = model(rows, labels=rows).loss.item()
    ours = validation_loss(
        load(control / "model"),
        split,
        seq_len=16,
        num_sequences=len(rows),
        batch_size=7,
        precision="fp32",
        world=World(),
    )
    assert ours == pytest.approx(loss, abs=1e-5)


def test_training_when_it_starts_from_a_model_goes_on_from_its_loss(
    tiny_corpus: str, tiny_data: Path, control: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_corpus, max_steps=1, model={"init_from": str(control / "model")})
    _train(config, tiny_data, tmp_path)
    assert losses(tmp_path)[1] == pytest.approx(losses(control)[12], abs=0.3)


def test_training_when_the_config_changed_is_refused(
    tiny_corpus: str, tiny_data: Path, control: Path
) -> None:
    changed = tiny_config(tiny_corpus, optimizer={"lr": 0.5}, max_steps=20)
    with pytest.raises(ConfigError, match=r"`max_steps` was 12 and is now 20; `optimizer\.lr` was"):
        _train(changed, tiny_data, control)


def test_training_when_the_newest_checkpoint_is_damaged_names_it(
    tiny_corpus: str, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_corpus)
    with pytest.raises(_KilledError):
        _train(config, tiny_data, tmp_path, _kill_at(8))
    shard = tmp_path / "checkpoints/step-00000006/__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00\x00")
    with pytest.raises(IntegrityError, match=r"step-00000006/__0_0\.distcp is damaged.*step 3"):
        _train(config, tiny_data, tmp_path)


def test_training_when_the_exported_model_is_damaged_is_refused(
    tiny_corpus: str, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_corpus, max_steps=2)
    _train(config, tiny_data, tmp_path)
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(IntegrityError, match=r"model\.safetensors is damaged"):
        _train(config, tiny_data, tmp_path)


def test_training_when_the_loss_is_no_number_stops(
    tiny_corpus: str, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_corpus, optimizer={"lr": 1e30}, schedule={"warmup_steps": 0})
    with pytest.raises(TrainingError, match=r"optimizer\.lr=1e\+30.*Lower"):
        _train(config, tiny_data, tmp_path)
    assert not (tmp_path / "model").exists()


def test_flops_when_counted_by_hand_are_equal() -> None:
    config = DecoderConfig(
        vocab_size=10, hidden_size=8, num_layers=3, num_heads=2, num_kv_heads=2, max_seq_len=16
    )
    # 6 per weight; 12 * layers * width * half the sequence for scores and their use on values
    assert flops_per_token(config, 1000, 16) == 6 * 1000 + 12 * 3 * 8 * 8
    untied = config.replace(tie_embeddings=False, sliding_window=4)
    assert flops_per_token(untied, 1000, 16) == 6 * 920 + 12 * 3 * 8 * 4
