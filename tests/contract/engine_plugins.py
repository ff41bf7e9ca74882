"""Engine plug-ins: how tests start them over a tiny model, and ask them."""

import asyncio
import importlib.util

import serving.engines
from jobs.config import DecoderConfig
from jobs.plugins import load_plugin, plugin_names
from serving.engines._protocol import Chunk, GenerateRequest

SHAPE = DecoderConfig(
    vocab_size=300,
    hidden_size=128,  # Heads of 32: the smallest that vLLM computes.
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
    initializer_range=0.3,  # Large, so that no two tokens are nearly as likely.
    bos_token_id=0,
    eos_token_id=1,
)
NAMES = plugin_names(serving.engines)
IS_VLLM_INSTALLED = importlib.util.find_spec("vllm") is not None  # `make test-vllm` has it.
# What makes an engine start soon and compute in float32 here.
OPTIONS = {"vllm": {"dtype": "float32", "enforce_eager": True}}
PROMPTS = [tuple((7 * i + j) % 298 + 2 for j in range(1 + 3 * i)) for i in range(12)]


class Plugin:
    """An engine plug-in by name, and how a test starts an engine of it."""

    def __init__(self, name):
        self.name = name
        self._module = load_plugin(serving.engines, name, what="engine")

    def create(self, directory, **options):
        return self._module.create(directory, {**OPTIONS.get(self.name, {}), **options})


async def chunks_of(engine, prompt_tokens=(5, 6, 7), **options) -> list[Chunk]:
    request = GenerateRequest(
        prompt_tokens=prompt_tokens, **{"max_tokens": 8, "temperature": 0.0, **options}
    )
    return [chunk async for chunk in engine.generate(request)]


def answer(engine, prompt_tokens=(5, 6, 7), **options) -> list[int]:
    return tokens_of(asyncio.run(chunks_of(engine, prompt_tokens, **options)))


def tokens_of(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)
