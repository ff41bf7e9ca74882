"""A tiny published model, and every engine plug-in over it. Here `make test-vllm` starts."""

import json
from functools import partial

import pytest
import torch
from engine_plugins import IS_VLLM_INSTALLED, NAMES, SHAPE, Plugin
from safetensors.torch import load_file, save_file
from tiny_models import publish

from jobs.models.decoder import build, load, save


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return publish(directory, partial(save, build(SHAPE, seed=3), dtype=torch.float32))


@pytest.fixture(scope="module")
def reference(directory):
    return load(directory)


@pytest.fixture(scope="module", params=[n for n in NAMES if n != "vllm" or IS_VLLM_INSTALLED])
def plugin(request):
    return Plugin(request.param)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A PEFT directory that changes one layer much."""
    directory = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(0)
    name = "base_model.model.model.layers.1.self_attn.o_proj"
    save_file(
        {
            f"{name}.lora_A.weight": torch.randn(4, 128, generator=generator) * 0.1,
            f"{name}.lora_B.weight": torch.randn(128, 4, generator=generator),
        },
        directory / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    config |= {"target_modules": ["o_proj"], "layers_to_transform": [1]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def adapted_reference(directory, adapter):
    """The model with the adapter's product added to its weight."""
    model = load(directory)
    parts = load_file(adapter / "adapter_model.safetensors")
    weight_a, weight_b = (parts[name] for name in sorted(parts))
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight += 8 / 4 * weight_b @ weight_a
    return model


@pytest.fixture(scope="module")
def engine(plugin, directory, adapter):
    engine = plugin.create(
        directory, max_slots=4, max_batch_tokens=16, adapters={"loud": str(adapter)}
    )
    yield engine
    engine.close()
