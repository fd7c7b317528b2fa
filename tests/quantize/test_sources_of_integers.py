"""Sources of packed integers: which of a config's groups a weight belongs to; what is refused."""

import pytest
import torch

from quantize.checkpoint.sources.find import find_stored_weights
from quantize.errors import QuantizeError
from tests.quantize import published as pub
from tests.quantize.published_integers import integers
from tests.quantize.source_headers import config, find, headers
from tests.quantize.stored_formats import assert_same


def test_integers_of_several_widths() -> None:
    """Which of the config's groups a weight belongs to is told by its shapes, or else its name."""
    wide, narrow = integers("a.q_proj", (20, 64), 0, bits=8), pub.int4_row()
    third = pub.kimi_k2_thinking()
    parts = [p.quantization["config_groups"]["group_0"] for p in (wide, narrow, third)]  # type: ignore[index]
    for group, targets in zip(parts, (["re:.*q_proj"], ["a.down_proj"], ["Linear"]), strict=True):
        group["targets"] = targets
    groups = {f"group_{number}": group for number, group in enumerate(parts)}
    quantization = {"format": "pack-quantized", "config_groups": groups}
    stored = wide.stored | narrow.stored | third.stored
    found = find_stored_weights(headers(stored), config(quantization))
    for published in (wide, narrow, third):
        [(name, expected)] = published.weights.items()
        parts_of = (published.stored[part] for part in found[name].parts)
        assert_same(found[name].decode(*parts_of), expected)
    parts[0]["targets"] = ["Linear"]
    parts[1]["targets"] = ["Linear"]
    with pytest.raises(QuantizeError, match=r"a.q_proj.weight_packed .* may be any of what config"):
        find_stored_weights(headers(stored), config(quantization))


def test_damaged_integers() -> None:
    """What only the tensors' values tell is an error that names the tensor, when it is read."""
    published = pub.int4_reordered()
    [stored_weight] = find(published).values()
    for part, value, message in (
        ("weight_shape", torch.tensor([300, 95]), r"down_proj.weight_packed: its weight_shape is "),
        ("weight_g_idx", torch.full((96,), 3).int(), "weight_g_idx has groups 3 to 3, but there"),
    ):
        stored = published.stored | {f"a.down_proj.{part}": value}
        with pytest.raises(QuantizeError, match=message):
            stored_weight.decode(*(stored[part] for part in stored_weight.parts))
    # Groups that nobody chose are neighbours.
    stored = published.stored | {"a.down_proj.weight_g_idx": torch.full((96,), -1).int()}
    unordered = stored_weight.decode(*(stored[part] for part in stored_weight.parts))
    del stored["a.down_proj.weight_g_idx"]
    [plain] = find(published._replace(stored=stored)).values()
    assert torch.equal(unordered, plain.decode(*(stored[part] for part in plain.parts)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": None}, "a.down_proj.weight_scale is missing"),
        ({"weight_scale": torch.ones(20, 5)}, r"\[20, 5\] are none of what config.json describes"),
        ({"weight_scale": torch.ones(20, 3).int()}, "a.down_proj.weight_scale has dtype I32"),
        ({"weight_zero_point": None}, "a.down_proj.weight_zero_point is missing, though"),
        ({"weight_zero_point": torch.ones(20, 3).int()}, r"expected I8 or I32 \[3, 3\]"),
        ({"weight_packed": None}, "belongs to packed integers, and config.json describes none"),
    ],
)
def test_incomplete_integers(change: dict[str, torch.Tensor | None], message: str) -> None:
    published = integers("a.down_proj", (20, 96), 32, zero="packed")
    stored = published.stored | {f"a.down_proj.{part}": t for part, t in change.items()}
    present = {name: t for name, t in stored.items() if t is not None}
    with pytest.raises(QuantizeError, match=message):
        find(published._replace(stored=present))


def test_integers_that_no_config_describes() -> None:
    published = pub.kimi_k2_thinking()
    with pytest.raises(QuantizeError, match="weight_packed belongs to packed integers, and config"):
        find_stored_weights(headers(published.stored), {})
