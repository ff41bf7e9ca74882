"""What the transformers engine must do beyond the common contract: other architectures."""

import asyncio

import pytest
import tiny_models
import torch
import transformers

from cluster.errors import EngineError, ModelFormatError
from cluster.storage import write_manifest
from serving.engines._protocol import GenerateRequest
from serving.engines.transformers import create

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
CONFIGS = {
    "bloom": transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4),
    "falcon_h1": transformers.FalconH1Config(
        **WIDE, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8
    ),
    "gemma2": transformers.Gemma2Config(**WIDE, head_dim=8, sliding_window=8),
    "gpt2": transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4),
    "gpt_oss": transformers.GptOssConfig(
        **WIDE, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
}
PROMPTS = [tuple((7 * i + j) % 298 + 2 for j in range(1 + 3 * i)) for i in range(8)]


def publish(config, directory):
    """Write a model with random weights large enough that no two tokens are nearly as likely."""
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, None
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in name:
                parameter.normal_(0.0, 0.3)
    tiny_models.publish(directory, model.save_pretrained)
    return model


def greedy(model, prompt_tokens, num):
    tokens = list(prompt_tokens)
    with torch.inference_mode():
        for _ in range(num):
            tokens.append(
                int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
            )
    return tokens[len(prompt_tokens) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_when_architecture_is_another_equals_its_own_forward(name, tmp_path):
    model = publish(CONFIGS[name], tmp_path)
    engine = create(tmp_path, {"max_slots": 4, "max_batch_tokens": 8, "max_len": 64})

    async def ask(prompt):
        request = GenerateRequest(
            prompt_tokens=prompt, max_tokens=12, temperature=0.0, ignore_eos=True
        )
        return [token async for chunk in engine.generate(request) for token in chunk.token_ids]

    async def ask_all():
        return await asyncio.gather(*map(ask, PROMPTS))

    answers = asyncio.run(ask_all())
    engine.close()
    assert answers == [greedy(model, prompt, 12) for prompt in PROMPTS]


def test_create_when_the_cache_is_of_another_form_is_refused(tmp_path):
    config = transformers.MambaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=8
    )
    publish(config, tmp_path)
    with pytest.raises(EngineError, match="MambaForCausalLM keeps its past in a form of its own"):
        create(tmp_path, {})


def test_create_when_architecture_is_unknown_is_refused(tmp_path):
    publish(CONFIGS["gpt2"], tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    write_manifest(tmp_path, {"kind": "model"})
    with pytest.raises(ModelFormatError, match="no_such_model"):
        create(tmp_path, {})


def test_create_when_adapter_is_no_directory_of_one_is_refused(tmp_path):
    publish(CONFIGS["gpt2"], tmp_path / "model")
    with pytest.raises(ModelFormatError, match=r"adapter `loud`.*adapter_config\.json"):
        create(tmp_path / "model", {"adapters": {"loud": str(tmp_path)}})
