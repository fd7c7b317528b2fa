"""Formats of quantized weights by their definitions, in float64: codes and scales to values.

No code of the package is used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
EXPERTS = 3


# The formats' definitions: OCP 8-bit Floating Point 1.0, OCP Microscaling Formats 1.0.


def e4m3(codes: np.ndarray) -> np.ndarray:
    sign = np.where(codes >> 7, -1.0, 1.0)
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7).astype(float)
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    return sign * np.where(codes & 0x7F == 0x7F, np.nan, value)


def e2m1(nibbles: np.ndarray) -> np.ndarray:
    sign = np.where(nibbles >> 3, -1.0, 1.0)
    exponent, mantissa = (nibbles >> 1 & 3).astype(int), (nibbles & 1).astype(float)
    return sign * np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def e2m1_pairs(packed: np.ndarray) -> np.ndarray:
    both = np.stack((e2m1(packed & 15), e2m1(packed >> 4)), -1)
    return both.reshape(*packed.shape[:-1], -1)


def e8m0(codes: np.ndarray) -> np.ndarray:
    return np.where(codes == 255, np.nan, 2.0 ** (codes.astype(float) - 127))


def spread(scale: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Repeat the scales of blocks to one scale for each weight.

    Args:
        scale: ``[..., rows of blocks, columns of blocks]``.
        block: rows and columns of a block.
        shape: the shape of the matrix, or of several stacked ones.
    """
    wide = np.repeat(np.repeat(scale, block[0], -2), block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


def product(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """``values * scale`` in float32, rounded once.

    The product of a value of these formats and a float32 scale is exact in float64.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return (values * scale).astype(np.float32)


def assert_same(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Assert float32, the same shape, NaN in the same places, and equal bits everywhere else."""
    assert actual.dtype == torch.float32
    assert tuple(actual.shape) == expected.shape
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(actual.numpy()), nan)
    bits = actual.contiguous().numpy().view(np.uint32)[~nan]
    assert np.array_equal(bits, np.ascontiguousarray(expected).view(np.uint32)[~nan])


# Published checkpoints.


class Published(NamedTuple):
    """A checkpoint in a published format.

    Attributes:
        stored: the tensors in its files, by name.
        quantization: ``quantization_config`` of its ``config.json``; None if there is none.
        weights: the float32 weights that they represent, by name.
        format: the expected key of ``quantize.checkpoint.sources.FORMATS``.
    """

    stored: dict[str, torch.Tensor]
    quantization: dict[str, Any] | None
    weights: dict[str, np.ndarray]
    format: str


def random_bytes(*shape: int, low: int = 0, high: int = 256) -> np.ndarray:
    """Random bytes, uint8. They depend only on the arguments, not on tests that ran before."""
    return np.random.default_rng([low, high, *shape]).integers(low, high, shape, np.uint8)


def tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    whole = torch.from_numpy(np.ascontiguousarray(array))
    return whole if dtype is None else whole.view(dtype)


def fp8(
    name: str,
    scale_name: str,
    shape: tuple[int, ...],
    grid: tuple[int, ...],
    block: tuple[int, int],
    quantization: dict[str, Any] | None,
    dtype: torch.dtype = torch.float32,
    spread_shape: tuple[int, ...] | None = None,
) -> Published:
    """An FP8 weight with random codes and scales.

    Args:
        name: the weight's name.
        scale_name: the scale's name.
        shape: the weight's shape.
        grid: the scale's shape.
        block: rows and columns of a block.
        quantization: as in :class:`Published`.
        dtype: the scale's dtype.
        spread_shape: the weight's shape as the matrices that are cut into blocks separately;
            ``shape`` by default.
    """
    codes = random_bytes(*shape)
    scale = torch.from_numpy(np.random.default_rng(grid or 1).uniform(1e-4, 1e-2, grid)).to(dtype)
    cut = spread_shape or shape
    values = e4m3(codes).reshape(cut)
    per_matrix = (*cut[:-2], -(-cut[-2] // block[0]), -(-cut[-1] // block[1]))
    wide = spread(scale.double().numpy().reshape(per_matrix), block, cut)
    stored = {name: tensor(codes, E4M3), scale_name: scale}
    return Published(stored, quantization, {name: product(values, wide).reshape(shape)}, "fp8")


def mx(
    stored: dict[str, torch.Tensor],
    quantization: dict[str, Any] | None,
    name: str,
    values: np.ndarray,
    scale: np.ndarray,
    fmt: str,
) -> Published:
    """An MX weight ``name``: ``values`` ``[..., in]`` with E8M0 ``scale`` ``[..., in / 32]``."""
    wide = np.repeat(e8m0(scale), 32, -1)
    return Published(stored, quantization, {name: product(values, wide)}, fmt)


def compressed_tensors_group(
    fmt: str, weights: dict[str, Any] | None = None, overall: str | None = None
) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float"} | (weights or {})
    groups = {"group_0": {"weights": weights, "format": fmt, "targets": ["Linear"]}}
    return {
        "quant_method": "compressed-tensors",
        "format": overall or fmt,
        "config_groups": groups,
    }
