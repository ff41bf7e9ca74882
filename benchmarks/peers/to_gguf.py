"""Write a dense Llama-shaped Hugging Face directory as a GGUF file for llama.cpp.

Every matrix takes the type asked for, the embedding (which is the head too) included; norms stay
float32. The layout of rotary weights is llama.cpp's (convert_hf_to_gguf.py, MIT).
"""

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def main(argv: list[str] | None = None) -> int:
    """Convert one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", choices=("Q8_0", "Q4_0"), required=True)
    arguments = parser.parse_args(argv)
    config = json.loads((arguments.model / "config.json").read_text())
    writer = gguf.GGUFWriter(arguments.output, "llama")
    _write_config(writer, config)
    kind = gguf.GGMLQuantizationType[arguments.type]
    for name, tensor in _tensors(arguments.model):
        renamed = _rename(name)
        if tensor.ndim == 1:
            writer.add_tensor(renamed, tensor)
            continue
        if renamed.endswith(("attn_q.weight", "attn_k.weight")):
            is_query = renamed.endswith("attn_q.weight")
            heads = config["num_attention_heads" if is_query else "num_key_value_heads"]
            tensor = _interleave(tensor, heads)
        writer.add_tensor(renamed, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return 0


def _write_config(writer: gguf.GGUFWriter, config: dict) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _rename(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _interleave(weight_OI: np.ndarray, heads: int) -> np.ndarray:
    halves = weight_OI.reshape(heads, 2, weight_OI.shape[0] // heads // 2, weight_OI.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight_OI.shape))


def _tensors(model: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield bfloat16 tensors as float32; numpy has no bfloat16, so the bytes are widened."""
    for path in sorted(model.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name == "__metadata__":
                continue
            assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            halves = np.frombuffer(data[start:stop], dtype="<u2").astype(np.uint32)
            yield name, (halves << 16).view(np.float32).reshape(entry["shape"])


if __name__ == "__main__":
    raise SystemExit(main())
