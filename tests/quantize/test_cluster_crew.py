"""What tasks of a Ray cluster make of experts, and what becomes of their errors.

Here is no cluster: what Ray would send goes through its pickler, and tasks run in the threads that
wait for them. With a cluster, see ``test_cluster.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle

from quantize.calibration import cluster_crew
from quantize.calibration.crew import LostError, Work
from quantize.calibration.routing import Routing
from quantize.calibration.samples import load_samples
from quantize.errors import QuantizeError
from quantize.nvfp4.rounding import METHODS
from quantize.run import cluster
from quantize.run.done import staged_of
from quantize.run.options import Options
from quantize.run.workers import make_shards
from tests.quantize import families
from tests.quantize.test_calibration import calibrated
from tests.quantize.test_crew import ONE_LAYER, WEIGHTS, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


class Task:
    """Of ``ray.remote``: :meth:`remote` returns what ``ray.get`` takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.calls: list[list[int]] = []

    def options(self, **more: Any) -> Task:
        assert more == {
            "num_cpus": 1, "num_gpus": 0, "max_retries": 3, "scheduling_strategy": "SPREAD"
        }  # fmt: skip
        return self

    def remote(self, *arguments: Any) -> Callable[[], Any]:
        self.calls.append(arguments[2])
        sent = cloudpickle.dumps((self._function, arguments))
        assert len(sent) < 20_000  # names, and no tensors but a norm

        def run() -> Any:
            function, given = cloudpickle.loads(sent)
            return cloudpickle.loads(cloudpickle.dumps(function(*given)))

        return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """A Ray with room for three tasks; the tasks that it was asked for."""
    tasks: list[Task] = []

    def remote(function: Callable[..., Any]) -> Task:
        tasks.append(Task(function))
        return tasks[-1]

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 3.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 3.0}}])
    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", lambda run: run())
    monkeypatch.setattr("quantize.execute.make_shards_on_ray", shards_here)
    return tasks


def shards_here(_: str, checkpoint: Any, plan: Any, record: Any, *rest: Any) -> None:
    missing, threads, progress = rest
    work = plan.calibrated(staged_of(record, plan))
    make_shards(checkpoint, work, record, missing, [CPU], threads, progress)


@pytest.mark.parametrize(
    "settings",
    [{"method": "two-sided"}, {"method": "gptq", "every_expert": True}],
    ids=["two-sided", "every expert"],
)
def test_tasks_make_what_one_device_makes(
    settings: dict[str, Any], fake: list[Task], trained: Path, text: Path, tmp_path: Path
) -> None:
    rows = load_samples(text, trained, 4, 64)
    calibrated(trained, tmp_path / "here", rows, ONE_LAYER, settings=settings, devices=[CPU])
    assert not fake
    calibrated(trained, tmp_path / "there", rows, ONE_LAYER, settings=settings, ray="auto")
    here, there = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("here", "there"))
    assert here == there
    assert len(fake) == 3
    assert sorted(n for task in fake for call in task.calls for n in call) == list(range(16))


def test_biases_are_read_too(fake: list[Task], tmp_path: Path) -> None:
    family, layout = "gpt_oss", families.LAYOUTS[0]
    source = families.save(families.build(family), family, layout, tmp_path / "source")
    rows = torch.randint(1, 16, (8, 32), generator=torch.Generator().manual_seed(0))
    more: dict[str, Any] = {"settings": {"method": "gptq"}}
    calibrated(source, tmp_path / "here", rows, Options(), devices=[CPU], **more)
    calibrated(source, tmp_path / "there", rows, Options(), ray="auto", **more)
    here, there = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("here", "there"))
    assert here == there


def test_a_norm_after_down_is_sent(fake: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to the model, which a task has not."""
    sent: list[Any] = []
    monkeypatch.setattr(Task, "remote", lambda _, *arguments: sent.append(arguments))
    monkeypatch.setattr(ray, "get", lambda _: [])
    monkeypatch.setattr(cluster_crew._Shared, "files", lambda *_: ())
    norm = torch.nn.LayerNorm(4)
    norm.weight.data.fill_(3.0)
    for norm_of in (norm, None):
        group: Any = object()
        member = cluster_crew._Slot(b"", [group], cluster_crew._Shared(), cluster.resources(None))
        weights: Any = type("Weights", (), {"post_norm": norm_of})
        member.round(Work(group, [(7, weights)], Routing(*tokens(), 4, CPU)))
    assert [one[2] for one in sent] == [[7], [7]]
    assert torch.equal(sent[0][4].weight, norm.weight)
    assert sent[0][4] is not norm
    assert sent[1][4] is None


def slot(fails: Exception, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A member whose task fails so."""

    def get(_: Any) -> Any:
        raise fails

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(cluster_crew._Shared, "files", lambda *_: ())
    group: Any = object()
    member = cluster_crew._Slot(b"", [group], cluster_crew._Shared(), cluster.resources(None))
    weights: Any = type("Weights", (), {"post_norm": None})
    return lambda: member.round(Work(group, [(0, weights)], Routing(*tokens(), 4, CPU)))


def task_error(cause: Exception) -> Exception:
    """Ray's, of a task that raised ``cause``; an instance of its class too."""
    error = ray.exceptions.RayTaskError("f", "traceback", cause)
    found: Exception = error.as_instanceof_cause()
    return found


@pytest.mark.parametrize(
    "fails",
    [
        ray.exceptions.WorkerCrashedError(),
        ray.exceptions.NodeDiedError("node died"),
        task_error(torch.OutOfMemoryError("CUDA out of memory")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lost_task_is_done_by_others(
    fails: Exception, fake: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it has failed several times: Ray may send it to another machine the next time."""
    member = slot(fails, monkeypatch)
    with pytest.raises(LostError):
        member()
    (task,) = fake
    assert len(task.calls) == 4


def test_a_task_that_fails_once_is_sent_again(
    fake: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    member = slot(task_error(torch.OutOfMemoryError("CUDA out of memory")), monkeypatch)
    fail, results = ray.get, iter([True, False])
    monkeypatch.setattr(ray, "get", lambda run: fail(run) if next(results) else [])
    assert member() == []


def test_tasks_are_told_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target may be a relative one, and a task runs in another folder."""
    monkeypatch.chdir(tmp_path)
    tensor = torch.from_file("states", shared=True, size=6, dtype=torch.bfloat16)
    tensor.fill_(3)
    file = cluster_crew._file_of(tensor)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert file is not None
    assert torch.equal(cluster_crew._mapped(file), tensor)


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (QuantizeError("a.safetensors: is damaged"), "a.safetensors: is damaged"),
        (ValueError("a bug"), "a task failed: ValueError: a bug"),
        (RuntimeError("failed to import on the worker"), "install it on all of them"),
    ],
)
def test_an_error_of_a_task_is_one_line(
    cause: Exception, message: str, fake: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(QuantizeError, match=message) as caught:
        slot(task_error(cause), monkeypatch)()
    assert len(str(caught.value).splitlines()) == 1


def test_hidden_states_that_another_machine_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are waited for: network file systems are slow."""
    whole = torch.arange(6, dtype=torch.bfloat16)
    file = cluster_crew.File(str(tmp_path / "x"), (2, 3), torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(cluster_crew, "SETTLE", 0.0)
        with pytest.raises(QuantizeError, match=r"x was written by another machine .* --work-dir"):
            cluster_crew._mapped(file)
        Path(file.path).write_bytes(b"half")
        with pytest.raises(QuantizeError, match="is not here"):
            cluster_crew._mapped(file)
    writing = threading.Timer(
        0.2, lambda: Path(file.path).write_bytes(whole.view(torch.uint8).numpy().tobytes())
    )
    writing.start()
    assert torch.equal(cluster_crew._mapped(file), whole.view(2, 3))
    writing.join()


def test_a_batch_is_what_a_gpu_takes_in_turn(
    fake: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster gets equal shares of a layer, since only a task knows how much fits."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 6.0})
    monkeypatch.setattr(cluster_crew, "run_of", lambda *_: b"")
    group: Any = type("Group", (), {"num_experts": 128})
    plan: Any = type("Plan", (), {"groups": [group]})
    nothing: Any = None
    fake_options = {"num_cpus": 1, "num_gpus": 1, "max_retries": 3, "scheduling_strategy": "SPREAD"}
    monkeypatch.setattr(
        Task, "options", lambda self, **more: self if more == fake_options else None
    )
    with cluster_crew.on_cluster("auto", nothing, plan, nothing, None, lambda _: None) as crew:
        assert len(fake) == 6
        assert crew.together(group, METHODS["two-sided"]) == 22
        assert crew.together(group, METHODS["descent"]) == 1
