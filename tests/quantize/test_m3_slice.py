"""The benchmarks' MiniMax-M3 slice is a checkpoint of the layout and sizes it announces."""

from pathlib import Path

import pytest
import torch

from benchmarks.m3_slice import Slice, write
from quantize.checkpoint.reader import Checkpoint
from quantize.experts.find import find
from quantize.experts.identify import identify


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("file_size", [10**9, 20_000])
def test_slice_is_read_as_announced(tmp_path: Path, fused: bool, file_size: int) -> None:
    what = Slice(layers=2, experts=4, hidden=64, intermediate=32, fused=fused)
    total = write(tmp_path, what, file_size)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.nbytes == total
        assert (len(checkpoint.files) > 1) == (file_size < total)
        groups = find(checkpoint)
        assert [(g.num_experts, g.hidden, g.intermediate) for g in groups] == [(4, 64, 32)] * 2
        assert {group.fused for group in groups} == {fused}
        experts = {name: checkpoint.load(name) for g in groups for name in g.tensor_names}
        rest = checkpoint.tensors.keys() - experts.keys()
        assert all("layernorm" in name or "gate" in name or "bias" in name for name in rest)
    values = torch.cat([tensor.flatten().float() for tensor in experts.values()])
    assert len(values) == 2 * 4 * 3 * 64 * 32
    assert values.std() == pytest.approx(0.02, rel=0.02)
    assert all(tensor.dtype == torch.bfloat16 for tensor in experts.values())
    assert "swiglu_oai(alpha=1.702, beta=1, limit=7" in str(identify(tmp_path))


def test_true_sizes() -> None:
    for fused in (False, True):
        experts = [out for out in Slice(fused=fused).tensors() if ".experts." in out.name]
        assert sum(out.nbytes for out in experts) == 16 * 3 * 6144 * 3072 * 2


def test_writing_again_replaces_the_files(tmp_path: Path) -> None:
    small = {"layers": 1, "experts": 2, "hidden": 32, "intermediate": 32}
    write(tmp_path, Slice(**small), 5_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    write(tmp_path, Slice(**small))
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    with Checkpoint(tmp_path) as checkpoint:
        assert len(find(checkpoint)) == 1
