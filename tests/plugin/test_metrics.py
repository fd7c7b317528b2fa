"""What ``/metrics`` says of NVFP4 experts, read by prometheus_client's own parser."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import ROOT
from vllm_nvfp4_moe import metrics, registration, settings

TOLD = dict.fromkeys(metrics.INFO, "") | {"layers": "57", "kernel": "HOPPER", "experts": "128"}

WORKER = """
import sys
from vllm_nvfp4_moe import metrics
told = dict.fromkeys(metrics.INFO, "") | dict(layers="57", kernel=sys.argv[2])
metrics.report(int(sys.argv[1]), told, float(sys.argv[3]))
"""
API = "from vllm_nvfp4_moe import metrics; metrics.show('m3')"
SCRAPE = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
SERVER = """
import os, subprocess, sys
from vllm_nvfp4_moe import metrics
metrics.share()
print(os.environ["NVFP4_MOE_RUN"], flush=True)
worker, api, scrape = sys.argv[1:]
for words in (["0", "HOPPER", "0.002"], ["1", "MARLIN", "0.004"]):
    subprocess.run([sys.executable, "-c", worker, *words], check=True)
for code in (api, api, scrape):
    subprocess.run([sys.executable, "-c", code], check=True)
"""


def samples(text: str) -> dict[tuple[str, str], Any]:
    from prometheus_client.parser import text_string_to_metric_families

    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    ours = [sample for sample in found if sample.name.startswith("nvfp4_moe_")]
    by_rank = {(sample.name, sample.labels["rank"]): sample for sample in ours}
    assert len(by_rank) == len(ours)
    return by_rank


def of_two_ranks(text: str) -> None:
    found = samples(text)
    assert len(found) == 4
    for rank, kernel, error in (("0", "HOPPER", 0.002), ("1", "MARLIN", 0.004)):
        info = found["nvfp4_moe_experts_info", rank]
        assert info.value == 1
        told = {"model_name": "m3", "rank": rank, "layers": "57", "kernel": kernel}
        assert {name: value for name, value in info.labels.items() if value} == told
        assert found["nvfp4_moe_self_check_error", rank].value == error


def test_from_workers_to_several_api_servers(tmp_path: Path) -> None:
    """They have a folder of prometheus_client's, and any of them answers for all."""
    (tmp_path / "prometheus").mkdir()
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    env["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path / "prometheus")
    env.pop(settings.RUN, None)
    done = subprocess.run(
        [sys.executable, "-c", SERVER, WORKER, API, SCRAPE],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    folder, text = done.stdout.split("\n", 1)
    of_two_ranks(text)
    assert Path(folder).parent == tmp_path
    assert not Path(folder).exists()  # the first process has ended


def test_from_workers_to_vllms_own_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prometheus_client import generate_latest
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    # That of a server in whose environment this one was started.
    monkeypatch.setenv(settings.RUN, str(tmp_path / "of another"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(metrics, "_made", [])
    metrics.share()
    (folder,) = metrics._made
    metrics.share()
    assert os.environ[settings.RUN] == folder and Path(folder).parent == tmp_path
    for words in (["0", "HOPPER", "0.002"], ["1", "MARLIN", "0.004"]):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", WORKER, *words], check=True, env=env)
    theirs: list[object] = []

    def log_engine_initialized(self: object) -> None:
        theirs.append(self)

    monkeypatch.setattr(PrometheusStatLogger, "log_engine_initialized", log_engine_initialized)
    for _ in range(2):  # vLLM may register plugins more than once
        registration._show_metrics()
    stat_logger = PrometheusStatLogger.__new__(PrometheusStatLogger)
    model = SimpleNamespace(served_model_name="m3")
    stat_logger.vllm_config = SimpleNamespace(model_config=model)
    stat_logger.log_engine_initialized()
    assert theirs == [stat_logger]
    of_two_ranks(generate_latest(get_prometheus_registry()).decode())


def test_processes_that_a_server_starts_share_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(settings.RUN, str(tmp_path))
    monkeypatch.setattr(metrics, "_made", [])
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "the server")
    metrics.share()
    assert os.environ[settings.RUN] == str(tmp_path) and not metrics._made


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(settings.RUN, str(tmp_path))
    monkeypatch.setattr(metrics, "_made", [str(tmp_path)])
    return tmp_path


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    from prometheus_client import REGISTRY

    yield
    for make in (metrics._info, metrics._error):
        if make.cache_info().currsize:
            REGISTRY.unregister(make())
            make.cache_clear()


def test_of_a_model(
    load: Callable[..., dict[str, Any]], shallow: dict[str, Path], run_folder: Path
) -> None:
    from prometheus_client import REGISTRY, generate_latest

    load(shallow["modelopt"])
    metrics.show("m3")
    found = samples(generate_latest(REGISTRY).decode())
    told = found["nvfp4_moe_experts_info", "0"].labels
    assert told.pop("variant") in {"AVX-512 with BF16", "AVX-512", "AVX2", "numba"}
    assert told == {
        "model_name": "m3", "rank": "0", "layers": "1", "experts": "32", "layout": "modelopt",
        "gate": "swiglu_oai(alpha=1.702, beta=1, limit=7)", "kernel": "the CPU kernel",
        "passed_over": "", "self_check": "passed",
    }  # fmt: skip
    assert 0 < found["nvfp4_moe_self_check_error", "0"].value < 0.02


def test_nothing_is_shown_of_other_models_and_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prometheus_client import REGISTRY, generate_latest

    monkeypatch.delenv(settings.RUN, raising=False)
    metrics.report(0, TOLD, None)
    metrics.show("m3")
    monkeypatch.setenv(settings.RUN, str(tmp_path / "of-another-machine"))
    metrics.report(0, TOLD, None)
    metrics.show("m3")
    assert "nvfp4_moe" not in generate_latest(REGISTRY).decode()
    assert list(tmp_path.iterdir()) == []


def test_without_a_check_there_is_no_error(run_folder: Path) -> None:
    from prometheus_client import REGISTRY, generate_latest

    metrics.report(3, TOLD, None)
    metrics.report(3, TOLD | {"layers": "1"}, 0.5)  # a draft model's
    metrics.show("m3")
    text = generate_latest(REGISTRY).decode()
    assert text.count("nvfp4_moe_experts_info{") == 2
    assert text.count("nvfp4_moe_self_check_error{") == 1
