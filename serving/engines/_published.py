"""What a model directory says about its weights, for engines that load it by other code than ours.

Takes a directory; gives bytes and formats. No weight is read.
"""

from pathlib import Path

from jobs.compression import quantization_config
from jobs.config import KvCache
from jobs.models import _hf, _weights

_SCALE = ".weight_scale"


def weight_bytes(directory: Path) -> int:
    """Return the bytes of all weight files."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def schemes(directory: Path) -> dict[str, str]:
    """Return the format of each quantized layer by name, none for a dense model.

    Raises ModelFormatError for a compressed-tensors format that we cannot name; another method of
    quantization is given as such, for the whole model.
    """
    document = _hf.read_config(directory).get(quantization_config.KEY)
    if document is None:
        return {}
    method = str(document.get("quant_method"))
    if method != "compressed-tensors":
        return {"model": method}
    names = sorted(_weights.tensor_names(directory))
    layers = [name.removesuffix(_SCALE) for name in names if name.endswith(_SCALE)]
    # Formats are told apart by the document alone; a shape only says how many scales there are.
    layouts = quantization_config.read_layouts(document, dict.fromkeys(layers, (1, 1)))
    return {name: layout.scheme for name, layout in layouts.items()}


def kv_cache(directory: Path) -> KvCache:
    """Return how the directory says that keys and values are cached.

    Raises ModelFormatError for a compressed-tensors scheme that is not ours.
    """
    document = _hf.read_config(directory)
    quantization = document.get(quantization_config.KEY) or {}
    if quantization.get("quant_method") != "compressed-tensors":
        return "auto"
    head_dim = document.get("head_dim")
    if head_dim is None:
        head_dim = document.get("hidden_size", 0) // document.get("num_attention_heads", 1)
    return quantization_config.read_kv_cache(quantization, head_dim)
