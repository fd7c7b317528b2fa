"""ModelOpt's recipes in the accuracy bench. ModelOpt is not part of the set-up; by hand:

pip install --no-deps --target X nvidia-modelopt==0.47.0 omegaconf antlr4-python3-runtime==4.9.3 \
    pulp nvidia-ml-py scipy
PYTHONPATH=X python -m pytest tests/peers
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.accuracy import Bench
from tests.benchmarks import tiny


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder: Path = tmp_path_factory.mktemp("accuracy") / request.param
    return Bench(tiny.save(request.param, folder), rows=6)


@pytest.mark.parametrize("recipe", peers.RECIPES)
def test_recipes(bench: Bench, recipe: str) -> None:
    pytest.importorskip("modelopt.torch.quantization")
    row = bench.modelopt(recipe, bench.calibration(4))
    assert not row.why, row.why
    assert row.weights is not None and row.activations is not None
    assert 0 < row.weights.kl < row.activations.kl
