"""Published checkpoints as sources see them: config and headers, without files or with them."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantize.checkpoint.sources.find import find_stored_weights
from quantize.checkpoint.sources.stored_weight import StoredWeight
from tests.quantize.checkpoints import save
from tests.quantize.published import config_of
from tests.quantize.stored_formats import E4M3, E8M0, Published

PLAIN = {"model.norm.weight": torch.arange(6.0).bfloat16()}


def write(folder: Path, published: Published, **more: Any) -> Path:
    return save(folder, published.stored | PLAIN, config_of(published), **more)


def find(published: Published) -> dict[str, StoredWeight]:
    """Without files: what is looked at is names, dtypes and shapes."""
    return find_stored_weights(headers(published.stored), config_of(published))


class Header(NamedTuple):
    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]


SAFETENSORS_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8",
    torch.int8: "I8", torch.int32: "I32", E4M3: "F8_E4M3", E8M0: "F8_E8M0",
    torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
}  # fmt: skip


def headers(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    file = Path("model-00001-of-00002.safetensors")
    return {
        name: Header(name, file, SAFETENSORS_NAMES[t.dtype], tuple(t.shape))
        for name, t in tensors.items()
    }


def config(quantization: Any) -> dict[str, Any]:
    return {"quantization_config": quantization}
