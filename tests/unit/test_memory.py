"""What a loaded model holds: its weights as they are stored, in memory of their own."""

from pathlib import Path

import pytest
import torch

from jobs.compression.packing import load_model, save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import Recipe, Step
from jobs.evaluation.compare import weight_file_bytes
from jobs.kernels import native
from jobs.kernels.memory import StoredEmbedding, give_back, resident
from jobs.models import decoder
from tests.tiny_models import decoder_config

# Most of it is the embedding; its head has a form of its own.
SHAPE = decoder_config(vocab_size=2048, hidden_size=128, intermediate_size=256, head_dim=32)
W8A8 = Step(method="rtn", options={"scheme": "w8a8"}, targets=("*", "lm_head"))
kernels = pytest.mark.skipif(not native.is_available(), reason="needs the C++ kernels")


@kernels
def test_load_when_the_head_is_quantized_holds_what_the_file_does(tmp_path: Path) -> None:
    save_compressed(apply_recipe(decoder.build(SHAPE, 0), Recipe(steps=(W8A8,))), tmp_path)
    loaded = load_model(tmp_path, verify=False)
    assert loaded.weight_bytes <= 1.02 * weight_file_bytes(tmp_path)


@kernels
def test_load_when_dense_keeps_the_embedding_in_bfloat16_and_its_values(tmp_path: Path) -> None:
    decoder.save(decoder.build(SHAPE, 0), tmp_path)
    loaded = load_model(tmp_path, verify=False).model
    assert isinstance(loaded.model.embed_tokens, StoredEmbedding)
    tokens_BT = torch.arange(12).view(2, 6)
    embedded = loaded.model.embed_tokens(tokens_BT)
    assert embedded.dtype == torch.float32
    dense = decoder.load(tmp_path)
    assert torch.equal(embedded, dense.model.embed_tokens(tokens_BT))
    torch.testing.assert_close(loaded(tokens_BT), dense(tokens_BT), rtol=1e-4, atol=1e-4)


def test_load_when_activations_are_bfloat16_has_a_plain_embedding(tmp_path: Path) -> None:
    decoder.save(decoder.build(SHAPE, 0), tmp_path)
    loaded = load_model(tmp_path, dtype=torch.bfloat16, verify=False).model
    assert isinstance(loaded.model.embed_tokens, torch.nn.Embedding)


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float32])
def test_resident_when_large_is_an_equal_copy_at_a_large_page(dtype: torch.dtype) -> None:
    weight = torch.randint(-100, 100, (2048, 1500), dtype=torch.int32).to(dtype)
    copy = resident(weight)
    assert torch.equal(copy, weight)
    assert copy.dtype == dtype
    assert copy.data_ptr() % (2 << 20) == 0
    weight.zero_()
    give_back()
    assert copy.abs().sum() > 0
