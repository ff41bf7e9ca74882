"""What a person reads who asks for a compression that cannot be: value and remedy, before work."""

from pathlib import Path

import pytest
from tiny_models import decoder_config, publish

from cluster.storage import staged_directory
from jobs.compress import main
from jobs.compression.packing import save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import Recipe, Step
from jobs.data.tokens import open_split
from jobs.models import decoder, encoder
from jobs.models.encoder import EncoderConfig

W8A8 = "{method: rtn, options: {scheme: w8a8}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A folder with a `decoder`, one of `another` tokenizer, an `encoder` and one `quantized`."""
    made = tmp_path_factory.mktemp("bad")
    config = decoder_config(vocab_size=open_split(tiny_data, "train").vocab_size, max_seq_len=64)
    with staged_directory(made / "decoder", {"kind": "model"}) as staging:
        decoder.save(decoder.build(config, seed=0), staging)
        tokenizer = tiny_data / "tokenizer" / "tokenizer.json"
        (staging / tokenizer.name).write_bytes(tokenizer.read_bytes())
    another = decoder.build(config.replace(vocab_size=300), seed=0)
    publish(made / "another", lambda directory: decoder.save(another, directory))
    shape = EncoderConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_layers=1, num_heads=4
    )
    publish(made / "encoder", lambda directory: encoder.save(encoder.build(shape, 0), directory))
    recipe = Recipe(steps=(Step(method="rtn", options={"scheme": "w8a8"}),))
    manifest = {"kind": "model", "lineage": {"parent": "runs/dense"}}
    with staged_directory(made / "quantized", manifest) as staging:
        save_compressed(apply_recipe(decoder.build(config, seed=0), recipe), staging)
    return made


@pytest.mark.parametrize("is_plan", [True, False], ids=["plan", "run"])
@pytest.mark.parametrize(
    ("model", "steps", "text", "words"),
    [
        (
            "decoder",
            "{method: gptq}",
            {"num_sequences": 9999},
            ["`calibration.num_sequences` = 9999", "of seq_len=16", "give more text"],
        ),
        (
            "decoder",
            "{method: gptq}",
            {"seq_len": 65, "num_sequences": 1},
            ["`calibration.seq_len` = 65", "64 positions", "Lower it"],
        ),
        (
            "another",
            "{method: gptq}",
            {},
            ["`calibration.data`", "another tokenizer", "tokenizer.json", "Prepare the text"],
        ),
        ("decoder", "{method: gptq}", None, ["step 1 (gptq)", "Give `calibration`"]),
        (
            "decoder",
            "{method: gptq, options: {damping: 0}}",
            {},
            ["options of step 1 (gptq)", "`damping` = 0", "greater than 0"],
        ),
        (
            "decoder",
            "{method: rtn, options: {scheme: w4a16, group_size: 128}}",
            None,
            ["group_size=128", "64 inputs", "q_proj", "Sizes that do: 16, 32, 64"],
        ),
        (
            "decoder",
            f"{W8A8}, {{method: magnitude, options: {{sparsity: 0.5}}}}",
            None,
            ["step 2 (magnitude)", "step 1 has quantized", "before quantizing"],
        ),
        (
            "quantized",
            W8A8,
            None,
            ["`model` = ", "quantized already", "made from: runs/dense"],
        ),
        *(
            ("encoder", steps, {}, [f"step 1 ({name})", "this model is an encoder", "Use rtn"])
            for name, steps in (
                ("gptq", "{method: gptq}"),
                ("smoothquant", f"{{method: smoothquant}}, {W8A8}"),
                ("depth", "{method: depth, options: {num_blocks: 1}}"),
                ("width", "{method: width, options: {hidden_size: 32}}"),
            )
        ),
    ],
)
def test_compress_when_input_is_bad_names_value_and_remedy(
    folder: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    is_plan: bool,  # noqa: FBT001  (a parameter of a test)
    model: str,
    steps: str,
    text: dict[str, int] | None,
    words: list[str],
) -> None:
    values = {"model": folder / model, "output": tmp_path / "out", "recipe.steps": f"[{steps}]"}
    if text is not None:
        asked = {"data": tiny_data, "num_sequences": 4, "seq_len": 16, **text}
        values |= {f"calibration.{key}": value for key, value in asked.items()}
    arguments = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    assert main([*arguments, *["--dry-run"] * is_plan]) == 2
    shown = capsys.readouterr().err
    assert [word for word in words if word not in shown] == []
    assert list(tmp_path.iterdir()) == []


def test_compress_when_the_hessian_is_singular_names_layer_and_damping(
    folder: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = "[{method: gptq, targets: ['*.0.mlp.up_proj'], options: {damping: 1.0e-20}}]"
    values = {
        "model": folder / "decoder",
        "output": tmp_path / "out",
        "recipe.steps": steps,
        "calibration.data": tiny_data,
        "calibration.num_sequences": 1,  # 16 tokens for 64 inputs
        "calibration.seq_len": 16,
    }
    assert main([p for key, value in values.items() for p in ("--set", f"{key}={value}")]) == 2
    shown = capsys.readouterr().err
    wanted = ["step 1 (gptq)", "`model.layers.0.mlp.up_proj`", "damping=1e-20", "Raise `damping`"]
    assert [word for word in wanted if word not in shown] == []
    assert list(tmp_path.iterdir()) == []
