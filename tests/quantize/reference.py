"""The tests' reference for quantize/, in plain numpy. No code of the package is used.

Number formats are tables that are made from their bit fields. Rounding searches these tables by
brute force. safetensors files are parsed from their bytes.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

INDEX = "model.safetensors.index.json"


def _e2m1(code: int) -> float:
    """The value of a code: sign 1 bit, exponent 2 bits with bias 1, mantissa 1 bit.

    Exponent 0 is subnormal.
    """
    exponent, mantissa = (code >> 1) & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return math.copysign(magnitude, -1.0 if code & 8 else 1.0)


def _e4m3(bits: int) -> float:
    """The value of a bit pattern: sign 1 bit, exponent 4 bits with bias 7, mantissa 3 bits.

    Exponent 0 is subnormal. There are no infinities; 0x7F and 0xFF are NaN.
    """
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    if bits & 0x7F == 0x7F:
        return math.nan
    if exponent == 0:
        magnitude = mantissa / 8 * 2.0**-6
    else:
        magnitude = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return math.copysign(magnitude, -1.0 if bits & 0x80 else 1.0)


E2M1 = np.array([_e2m1(code) for code in range(16)])
E4M3 = np.array([_e4m3(bits) for bits in range(256)])
POSITIVE_E4M3 = range(1, 127)
"""Bit patterns of E4M3's positive finite values, 2**-9 to 448."""


def _nearest(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The index of the nearest value of ``table``, ties to the even index."""
    distance = np.abs(np.asarray(x, np.float64)[..., None] - table)
    best = distance.min(-1, keepdims=True)
    index = np.arange(len(table))
    # At most two values are nearest. That with the even index has 0 as its mantissa's last bit.
    return np.where(distance == best, index + 1000 * (index % 2), 10**6).argmin(-1)


def nearest_e2m1(x: np.ndarray) -> np.ndarray:
    """Codes 0 to 15 of the nearest E2M1 values, at most 6 in magnitude. Zeros keep their sign."""
    return _nearest(np.minimum(np.abs(x), 6.0), E2M1[:8]) | (np.signbit(x).astype(np.int64) << 3)


def nearest_e4m3(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest positive E4M3 values: never zero, at most 448."""
    table = E4M3[list(POSITIVE_E4M3)]
    # An index in ``table`` is the bits minus 1, so even and odd are swapped. Prepending zero puts
    # that right; maximum then keeps zero from being chosen.
    return np.maximum(_nearest(np.clip(x, table[0], table[-1]), np.concatenate(([0.0], table))), 1)


def max_rule(*weights: np.ndarray) -> tuple[np.float32, list[tuple[np.ndarray, np.ndarray]]]:
    """The documented ``max`` rule in float32: (global scale, [(codes, block scale bits), ...])."""
    weights = tuple(np.asarray(w, np.float32) for w in weights)
    amax = np.float32(max(np.abs(w).max() for w in weights))
    scale = amax / np.float32(6 * 448) if amax > 0 else np.float32(1)
    results = []
    for weight in weights:
        blocks = weight.reshape(weight.shape[0], -1, 16)
        bits = nearest_e4m3(np.abs(blocks).max(-1) / (np.float32(6) * scale))
        step = E4M3[bits].astype(np.float32) * scale
        codes = nearest_e2m1(blocks / step[..., None]).reshape(weight.shape)
        results.append((codes, bits))
    return scale, results


def unpack(packed: np.ndarray) -> np.ndarray:
    """The codes of packed bytes: byte k has code 2k in its low nibble, 2k + 1 in its high one."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int64)
    codes[..., 0::2] = packed % 16
    codes[..., 1::2] = packed // 16
    return codes


def dequantize(packed: np.ndarray, scale_bits: np.ndarray, scale: float) -> np.ndarray:
    """float64 ``[..., in]``: e2m1(code) * e4m3(bits) * scale; only the last product is rounded."""
    values = E2M1[unpack(packed)]
    return values * np.repeat(E4M3[scale_bits], 16, axis=-1) * np.float64(scale)


_NUMPY = {
    "F32": np.float32,
    "F16": np.float16,
    "F64": np.float64,
    "U8": np.uint8,
    "F8_E4M3": np.uint8,  # as bits
    "I64": np.int64,
    "BOOL": np.bool_,
}


class Raw(NamedTuple):
    """A tensor as it is stored in a safetensors file: dtype, shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def array(self) -> np.ndarray:
        """Its values as a numpy array. F8_E4M3 is returned as bits (uint8), and BF16 as float32."""
        if self.dtype == "BF16":
            # BF16 is the upper half of float32.
            bits = np.frombuffer(self.data, np.uint16).astype(np.uint32) << 16
            return bits.view(np.float32).reshape(self.shape)
        return np.frombuffer(self.data, _NUMPY[self.dtype]).reshape(self.shape)


def read_file(path: Path) -> dict[str, Raw]:
    """All tensors of one safetensors file. Asserts that the tensors cover its data without gaps."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body, end, out = data[8 + length :], 0, {}
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = info["data_offsets"]
        assert start == end, f"{path.name}: gap before {name}"
        out[name] = Raw(info["dtype"], tuple(info["shape"]), body[start:stop])
        end = stop
    assert end == len(body), f"{path.name}: {len(body) - end} bytes belong to no tensor"
    return out


def read_folder(folder: Path) -> dict[str, Raw]:
    """All tensors of a checkpoint, each read from the file that the index names."""
    index = folder / INDEX
    if not index.exists():
        return read_file(folder / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    files = {name: read_file(folder / name) for name in set(weight_map.values())}
    return {name: files[file][name] for name, file in weight_map.items()}


def weight(tensors: dict[str, Raw], module: str) -> np.ndarray:
    """The dequantized weight, float64 ``[out, in]``, of one module in either layout."""
    if f"{module}.weight_packed" in tensors:
        packed, scale = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_global_scale"]
        factor = 1 / np.float64(scale.array().item())
    else:
        packed, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale_2"]
        factor = np.float64(scale.array().item())
    return dequantize(packed.array(), tensors[f"{module}.weight_scale"].array(), factor)
