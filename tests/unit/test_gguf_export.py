"""GGUF export, read back by the gguf package's own reader and arithmetic."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_models import decoder_config

from cluster.errors import ModelFormatError, TokenizerError
from cluster.storage import staged_directory, write_manifest
from jobs.compression.gguf_export import export_gguf
from jobs.compression.packing import save_compressed
from jobs.compression.recipe import Compressed, apply_recipe
from jobs.config import KvCache, Recipe, Step
from jobs.data.tokens import open_split
from jobs.kernels.formats import GROUPED
from jobs.models.decoder import build

PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_down": "mlp.down_proj",
}


def quantize(scheme: str, *targets: str, group_size: int = 32) -> Step:
    groups = {"group_size": group_size} if scheme in GROUPED else {}
    options = {"scheme": scheme, **groups}
    return Step(method="rtn", targets=targets or ("*",), options=options)


def publish(
    folder: Path, data: Path, *steps: Step, shape: str = "llama", kv_cache: KvCache = "auto"
) -> Compressed:
    config = decoder_config(
        shape=shape,
        vocab_size=open_split(data, "train").vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=2,
    )
    recipe = Recipe(steps=steps, kv_cache=kv_cache)
    compressed = apply_recipe(build(config, seed=0).to(torch.bfloat16).float(), recipe)
    with staged_directory(folder, {"kind": "model"}) as staging:
        save_compressed(compressed, staging)
        for path in (data / "tokenizer").iterdir():
            shutil.copyfile(path, staging / path.name)
    return compressed


def change_tokenizer(folder: Path, **changes: object) -> None:
    """Write another tokenizer.json into a model directory, and its digest into the manifest."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    write_manifest(folder, {"kind": "model"})


def read(path: Path) -> dict[str, np.ndarray]:
    """Return every tensor in float32, rows as the file has them."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(
    ("steps", "kind"),
    [
        ((quantize("w8a8"),), "Q8_0"),
        ((quantize("w8a16"),), "Q8_0"),
        ((quantize("w4a16"),), "Q4_0"),
        ((quantize("w4a8"),), "Q4_0"),
        ((quantize("w3a16"),), "Q4_0"),
        ((), "BF16"),
    ],
)
def test_export_when_read_back_holds_the_very_weights(
    tmp_path: Path, tiny_data: Path, shape: str, steps: tuple[Step, ...], kind: str
) -> None:
    compressed = publish(tmp_path / "model", tiny_data, *steps, shape=shape)
    kinds = export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    found = read(tmp_path / "model.gguf")
    config = compressed.model.config
    for block in range(config.num_layers):
        for theirs, ours in PARTS.items():
            name = f"blk.{block}.{theirs}.weight"
            expected = compressed.model.get_submodule(f"model.layers.{block}.{ours}").weight
            if shape in ("llama", "mistral") and theirs in ("attn_q", "attn_k"):
                halves = expected.unflatten(0, (-1, 2, config.resolved_head_dim // 2))
                expected = halves.transpose(1, 2).flatten(0, 2)
            assert kinds[name] == kind
            assert np.array_equal(found[name], expected.detach().numpy()), name
    embedding = compressed.model.model.embed_tokens.weight.detach().numpy()
    assert np.array_equal(found["token_embd.weight"], embedding)
    if shape == "qwen2":
        bias = compressed.model.get_submodule("model.layers.0.self_attn.q_proj").bias
        assert np.array_equal(found["blk.0.attn_q.bias"], bias.detach().numpy())


def test_export_holds_the_shape_and_the_tokenizer(tmp_path: Path, tiny_data: Path) -> None:
    compressed = publish(tmp_path / "model", tiny_data, quantize("w8a8"))
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", dense="Q8_0")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")

    def value(key: str) -> object:
        field = reader.get_field(key)
        assert field is not None, key
        return field.contents()

    config = compressed.model.config
    assert value("general.architecture") == "llama"
    assert value("llama.block_count") == config.num_layers
    assert value("llama.attention.head_count_kv") == config.num_kv_heads
    tokens = value("tokenizer.ggml.tokens")
    vocab = json.loads((tiny_data / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert isinstance(tokens, list)
    assert all(tokens[number] == token for token, number in vocab.items())
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((quantize("fp8"),), "FP8, which GGUF does not have"),
        ((quantize("w4a16", group_size=16),), "every 16 inputs.*group_size 32, 64 or 128"),
    ],
)
def test_export_when_gguf_cannot_hold_a_layer_names_it(
    tmp_path: Path, tiny_data: Path, steps: tuple[Step, ...], words: str
) -> None:
    publish(tmp_path / "model", tiny_data, *steps)
    with pytest.raises(ModelFormatError, match=rf"`model\.layers\.0.*{words}"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")


def test_export_when_the_recipe_caches_in_int8_says_what_llama_cpp_must_be_told(
    tmp_path: Path, tiny_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds: tuple[KvCache, ...] = ("auto", "int8")
    for kv_cache in kinds:
        caplog.clear()
        publish(tmp_path / kv_cache, tiny_data, kv_cache=kv_cache)
        export_gguf(tmp_path / kv_cache, tmp_path / f"{kv_cache}.gguf")
        assert ("--cache-type-k q8_0" in caplog.text) == (kv_cache == "int8")


def test_export_when_the_tokenizer_cuts_text_otherwise_is_refused(
    tmp_path: Path, tiny_data: Path
) -> None:
    publish(tmp_path / "model", tiny_data, quantize("w8a8"))
    change_tokenizer(tmp_path / "model", pre_tokenizer={"type": "Whitespace"})
    with pytest.raises(ModelFormatError, match="byte-level BPE"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")


def test_export_when_the_tokenizer_has_ids_that_the_model_lacks_is_refused(
    tmp_path: Path, tiny_data: Path
) -> None:
    publish(tmp_path / "model", tiny_data, quantize("w8a8"))
    document = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    added = {**document["added_tokens"][0], "id": 70_000, "content": "<|more|>"}
    change_tokenizer(tmp_path / "model", added_tokens=[*document["added_tokens"], added])
    with pytest.raises(TokenizerError, match=r"tokenizer has \d+ tokens and .*vocab_size is"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")


@pytest.mark.parametrize("adds_bos", [True, False])
def test_export_says_to_begin_as_the_tokenizer_does(
    tmp_path: Path, tiny_data: Path, *, adds_bos: bool
) -> None:
    publish(tmp_path / "model", tiny_data, quantize("w8a8"))
    if not adds_bos:
        change_tokenizer(tmp_path / "model", post_processor=None)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    field = reader.get_field("tokenizer.ggml.add_bos_token")
    assert field is not None
    assert field.contents() is adds_bos
    assert reader.get_field("tokenizer.ggml.bos_token_id") is not None
