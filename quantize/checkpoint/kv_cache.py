"""What a source says of its key-value cache: how keys and values are stored, and their scales.

Each tool has words of its own for that, in ``config.json`` or beside it:

* ModelOpt: ``kv_cache_quant_algo`` (``FP8``, ``NVFP4``), in ``hf_quant_config.json`` or in the
  ``quantization_config`` that is made of it, where newer versions write ``kv_cache_scheme``
  instead; scales ``k_proj.k_scale``, ``v_proj.v_scale``, of latent attention too;
* compressed-tensors: ``kv_cache_scheme``, its ``QuantizationArgs``; scales ``k_scale`` and
  ``v_scale`` of the attention, one number or, with ``strategy: attn_head``, one for each head;
* Quark: ``export.kv_cache_group`` names the linears whose ``output_tensors`` are the cache's;
  scales ``k_proj.output_scale``, ``v_proj.output_scale``.

The other names are those that vLLM 0.32 reads (``QuantizationConfig.get_cache_scale_mapper``). A
scale multiplies what is stored in every one of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.checkpoint.descriptions import descriptions
from quantize.checkpoint.json_files import read_json
from quantize.checkpoint.tensors import PLAIN, TensorInfo
from quantize.errors import QuantizeError

FP8, FP8_HEAD, NVFP4 = "fp8", "fp8-head", "nvfp4"
"""Kinds of caches: E4M3 with a scale for each attention's keys and one for its values; E4M3 with a
scale for each head; NVFP4."""

_OLDER = "hf_quant_config.json"
_NOTHING: tuple[Any, ...] = (None, "", {}, [])
_SCALES = re.compile(
    r"(?P<attention>.+?)\.(?:"
    r"(?:[kv]_proj\.|qk(?:qk)?v_proj\.)?(?P<one>[kv])_scale"
    r"|(?P<output>[kv])_proj\.output_scale"
    r"|(?P<cache>[kv])_cache\.scale"
    r"|kv_scale)"
)
_ZERO = re.compile(r".+\.[kv]_zero_point")
"""Only an asymmetric cache uses them, and no engine reads one."""


@dataclass(frozen=True)
class StoredCache:
    """What a source says of its cache.

    Attributes:
        kind: ``FP8``, ``FP8_HEAD`` or ``NVFP4``; None if it is none of these, or nothing.
        key: where it is described, file and key; None if nothing describes it. Then there are no
            scales either: what is called like one may be a weight.
        said: what stands there, as JSON.
        scales: by the module path of an attention: the scale of its keys as ``k``, of its values
            as ``v``. They may be one tensor.
        others: names of other tensors that only a cache has.
    """

    kind: str | None = None
    key: str | None = None
    said: str = ""
    scales: Mapping[str, Mapping[str, TensorInfo]] = field(default_factory=dict)
    others: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """Of all its tensors."""
        pairs = (pair.values() for pair in self.scales.values())
        return self.others.union(info.name for pair in pairs for info in pair)

    def pairs(self) -> dict[str, tuple[TensorInfo, TensorInfo]]:
        """By the module path of an attention: the scales of its keys and of its values.

        Raises:
            QuantizeError: if keys have a scale and values have none, if a scale is no float, or if
                it is not as many numbers as the description says.
        """
        for attention, pair in self.scales.items():
            for info in pair.values():
                many = info.shape not in ((), (1,))
                if info.dtype not in PLAIN or 0 in info.shape or (many and self.kind != FP8_HEAD):
                    raise QuantizeError(
                        f"{info.file.name}: {info.name} is {info.dtype} {list(info.shape)}, "
                        f"expected one float ({self.key}); {_LEAVE_OUT}"
                    )
            if len(pair) < 2:
                [info] = pair.values()
                raise QuantizeError(
                    f"{info.file.name}: {info.name} is there, but {attention} has no scale of its "
                    f"{'values' if 'k' in pair else 'keys'}; {_LEAVE_OUT}"
                )
        return {attention: (pair["k"], pair["v"]) for attention, pair in self.scales.items()}


def is_cache_scale(name: str) -> bool:
    """Whether a tensor is called as a scale of keys and values is, whatever describes it."""
    return _SCALES.fullmatch(name) is not None


def kv_cache_of(
    folder: Path, config: dict[str, Any], stored: Mapping[str, TensorInfo]
) -> StoredCache:
    """What the checkpoint in ``folder`` says of its cache.

    Args:
        config: the contents of ``config.json``.
        stored: every tensor in the files, by name.
    """
    described = next(_described(folder, config), None)
    if described is None:
        return StoredCache()
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in stored.items():
        if match := _SCALES.fullmatch(name):
            which = match["one"] or match["output"] or match["cache"] or "kv"
            found.setdefault(match["attention"], {}).update(dict.fromkeys(which, info))
    others = frozenset(name for name in stored if _ZERO.fullmatch(name))
    key, value, kind = described
    return StoredCache(kind, key, json.dumps(value), found, others)


_LEAVE_OUT = "--kv-cache auto leaves the scales of keys and values out"


def _described(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any, str | None]]:
    """Where the cache is described, what stands there, and of which kind it is."""
    for path, value in descriptions(config):
        yield from _words(f"config.json: {path}", value)
    if (folder / _OLDER).exists():
        yield from _words(_OLDER, read_json(folder / _OLDER))


def _words(where: str, value: Any) -> Iterator[tuple[str, Any, str | None]]:
    if not isinstance(value, dict):
        return
    nested = value.get("quantization")
    places = [(where, value)]
    places += [(f"{where}.quantization", nested)] if isinstance(nested, dict) else []
    for place, fields in places:
        scheme, algorithm = fields.get("kv_cache_scheme"), fields.get("kv_cache_quant_algo")
        if scheme not in _NOTHING:
            yield f"{place}.kv_cache_scheme", scheme, _kind(scheme)
        if algorithm not in _NOTHING and str(algorithm).lower() != "none":
            yield f"{place}.kv_cache_quant_algo", algorithm, _kind(algorithm)
    export = value.get("export")
    group = export.get("kv_cache_group") if isinstance(export, dict) else None
    if isinstance(group, list) and group:
        layers = value.get("layer_quant_config")
        found = [layers.get(str(name)) if isinstance(layers, dict) else None for name in group]
        outputs = [one.get("output_tensors") if isinstance(one, dict) else None for one in found]
        fp8 = all(
            isinstance(one, dict)
            and (one.get("dtype"), one.get("qscheme")) == ("fp8_e4m3", "per_tensor")
            and not one.get("is_dynamic")
            for one in outputs
        )
        yield f"{where}.export.kv_cache_group", outputs, FP8 if fp8 else None


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return value.lower() if value.lower() in (FP8, NVFP4) else None
    if not isinstance(value, dict) or value.get("type") != "float" or value.get("dynamic"):
        return None
    if value.get("symmetric") is False:
        return None
    kinds = {
        (8, None): FP8, (8, "tensor"): FP8, (8, "attn_head"): FP8_HEAD, (4, None): NVFP4,
    }  # fmt: skip
    bits, strategy = value.get("num_bits"), value.get("strategy")
    return next((kind for words, kind in kinds.items() if words == (bits, strategy)), None)
