"""``--ray``: a cluster of two workers makes the files that one machine makes, whatever happens."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.run import cluster
from quantize.run.options import Options
from quantize.run.plan import plan
from quantize.run.record import FOLDER, Record
from tests.quantize import checkpoints
from tests.quantize.checkpoints import ONE_THREAD
from tests.quantize.test_cli import refusal, run

SHARDS = ("--max-shard-size", "5KB")
COMMAND = (str(Path(sys.executable).with_name("nvfp4-moe")), "quantize")
LAST = "model.layers.1.mlp.experts.3.down_proj"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray cluster here: a head that takes no tasks, and two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    ray = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    try:
        for _ in range(2):
            ray.add_node(wait=False, num_cpus=1, object_store_memory=small["object_store_memory"])
        ray.wait_for_nodes()
        yield ray.address
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose last expert comes last, so that shards before it are done before it."""
    model = checkpoints.build("qwen3_moe")
    folder = tmp_path_factory.mktemp("cluster") / "source"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one machine makes, its report included."""
    folder = tmp_path_factory.mktemp("alone")
    with working_in(folder):
        assert run("quantize", source, "out", *SHARDS).exit_code == 0
    files = everything(folder / "out")
    assert len([name for name in files if name.endswith(".safetensors")]) > 5
    return files


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """The report has the command line, with the target as it was typed."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


class Watcher(threading.Thread):
    """Sees who writes: each partial file has its process's number in its name."""

    def __init__(self, target: Path, on_sight: Callable[[int], None] = lambda _: None) -> None:
        super().__init__(daemon=True)
        self.folder = target / FOLDER
        self.on_sight = on_sight
        self.nodes: dict[int, int] = {}
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.001):
            for file in self.folder.glob("*.safetensors.*.partial"):
                process = int(file.name.split("-")[-1].removesuffix(".partial"))
                if process not in self.nodes:
                    try:
                        self.nodes[process] = psutil.Process(process).ppid()
                    except psutil.NoSuchProcess:
                        continue
                    self.on_sight(process)

    def __enter__(self) -> "Watcher":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def damage(source: Path, folder: Path) -> Path:
    """A copy with a NaN in its last expert."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAST}.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def repair(source: Path, folder: Path) -> None:
    """Its time too: what was made from a file that changed is made again (``test_record.py``)."""
    file = folder / "model.safetensors"
    before = file.stat().st_mtime_ns
    shutil.copyfile(source / "model.safetensors", file)
    os.utime(file, ns=(before, before))


# -- the same files --------------------------------------------------------------------------------


def test_two_nodes_make_what_one_machine_makes(
    address: str, source: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    """As a user would, from a folder from which this package cannot be imported by chance; and
    though a process is killed in mid-task."""
    killed: list[int] = []

    def kill_one(process: int) -> None:
        if not killed:
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    with Watcher(tmp_path / "out", kill_one) as watcher:
        result = subprocess.run(
            [*COMMAND, source, "out", *SHARDS, "--ray", address],
            cwd=tmp_path,
            env=ONE_THREAD,
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr
    assert everything(tmp_path / "out") == alone
    assert killed
    assert len(set(watcher.nodes.values())) == 2  # processes that are children of two nodes
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == [
        "out", "Report", "Serve",
    ]  # fmt: skip
    # Ray's notices of a process that died, if it sees one, are on standard error too.
    summary, *_, bar = [line for line in result.stderr.splitlines() if line]
    assert summary == "2 MoE layers, 8 experts, gate silu"
    assert bar.startswith("Quantizing")
    assert "100%" in bar
    assert "Traceback" not in result.stderr


CALIBRATE = """
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
import torch
from quantize.calibration.quantizer import Rounder
from quantize.calibration.samples import digest_of
from quantize.run.options import Calibration
from quantize.checkpoint.reader import Checkpoint
from quantize.run.cluster import connected
from quantize.execute import execute
from quantize.run.options import Options
from quantize.run.plan import plan

source, target, address = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
rows = torch.randint(1, 16, (4, 64), generator=torch.Generator().manual_seed(0))
settings = Calibration("text", *rows.shape, digest_of(rows), "two-sided")
if address:
    Rounder.round = None  # the driver's: it must not be called
with connected(address) if address else nullcontext(), Checkpoint(source) as checkpoint:
    steps = plan(checkpoint, Options(max_shard_size=5000, calibration=settings))
    execute(checkpoint, steps, target, samples=rows, ray=address or None)
"""


def test_calibrated_on_a_cluster(address: str, source: Path, tmp_path: Path) -> None:
    """The driver runs the model; the nodes round experts, and make the files."""
    for name, where in (("alone", ""), ("nodes", address)):
        done = subprocess.run(
            [sys.executable, "-c", CALIBRATE, source, tmp_path / name, where],
            env=ONE_THREAD, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    alone, nodes = (everything(tmp_path / name) for name in ("alone", "nodes"))
    tensors = [name for name in alone if name.endswith(".safetensors")]
    assert len(tensors) > 5
    assert {name: nodes[name] for name in tensors} == {name: alone[name] for name in tensors}
    assert nodes.keys() == alone.keys()


def test_as_many_experts_at_once_as_the_cluster_has_room_for(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    with cluster.connected(address):
        assert cluster.slots(None) == 2  # two nodes of one CPU; the head has none
        monkeypatch.setattr(
            ray, "nodes", lambda: [
                {"Alive": True, "Resources": {"CPU": 7.0}},
                {"Alive": True, "Resources": {"CPU": 5.0}},
                {"Alive": False, "Resources": {"CPU": 64.0}},
                {"Alive": True, "Resources": {}},
            ],
        )  # fmt: skip
        assert cluster.slots(3) == 2 + 1
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 16.0, "CPU": 12.0})
        assert cluster.slots(3) == 16


def test_a_damaged_expert_on_a_cluster(address: str, source: Path, tmp_path: Path) -> None:
    """The error is that of one machine: it names tensor and file, and no machine is lost by it."""
    done = subprocess.run(
        [sys.executable, "-c", CALIBRATE, damage(source, tmp_path / "damaged"), tmp_path / "out",
         address],
        env=ONE_THREAD, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("quantize.errors.DamagedWeightsError: model.safetensors: expert 3 of ")
    assert f"{LAST}.weight" in last
    assert "lost" not in done.stderr
    assert not (tmp_path / "out" / "config.json").exists()


def test_another_goes_on_with_a_run_that_failed(
    address: str, source: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    """A task's error arrives in one line; one machine takes over from Ray, and Ray from it."""
    for name, first, second in (
        ("here", ["--ray", address], []),
        ("there", [], ["--ray", address]),
    ):
        (tmp_path / name).mkdir()
        with working_in(tmp_path / name):
            # Under the same path, since the report has it; the target's is relative.
            damaged = damage(source, tmp_path / "damaged")
            message = refusal("quantize", damaged, "out", *SHARDS, *first)
            assert LAST in message
            assert "NaN" in message
            out = tmp_path / name / "out"
            assert not (out / "config.json").exists()
            done = {f: f.stat().st_mtime_ns for f in out.glob("*.safetensors")}
            assert done
            repair(source, damaged)
            result = run("quantize", damaged, "out", *SHARDS, "--resume", *second)
            assert result.exit_code == 0, result.output
            assert {f: f.stat().st_mtime_ns for f in done} == done
            made = everything(out)
            assert {n: d for n, d in made.items() if "_report." not in n} == {
                n: d for n, d in alone.items() if "_report." not in n
            }
            shutil.rmtree(damaged)


@pytest.mark.parametrize("which", ["SIGINT", "SIGTERM"])
def test_an_interrupted_driver_leaves_a_run_to_resume(
    which: str, address: str, source: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    """Ctrl-C, or what schedulers send, while one task hangs: none writes any more once the command
    has ended."""
    out = tmp_path / "out"
    hanging: list[int] = []

    def stop_the_second(process: int) -> None:
        if len(watcher.nodes) == 2:
            os.kill(process, signal.SIGSTOP)
            hanging.append(process)

    driver = subprocess.Popen(
        [*COMMAND, source, "out", *SHARDS, "--ray", address],
        cwd=tmp_path,
        env=ONE_THREAD,
        stderr=subprocess.PIPE,
        text=True,
    )
    with Watcher(out, stop_the_second) as watcher:
        deadline = time.monotonic() + 180
        while not (hanging and any(out.glob("*.safetensors"))):
            assert time.monotonic() < deadline
            assert driver.poll() is None
            time.sleep(0.01)
    driver.send_signal(signal.Signals[which])
    time.sleep(0.5)
    for process in hanging:
        os.kill(process, signal.SIGCONT)
    _, stderr = driver.communicate(timeout=30)
    assert driver.returncode == 130, stderr
    assert "--resume" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    before = everything(out)
    assert "config.json" not in before
    time.sleep(0.5)
    assert everything(out) == before
    with working_in(tmp_path):
        assert run("quantize", source, "out", *SHARDS, "--resume").exit_code == 0
    assert everything(out) == alone


# -- what can be wrong with a cluster --------------------------------------------------------------


@contextmanager
def port(answers: bool) -> Iterator[int]:
    """One that nothing listens on, or where something listens that is not Ray."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if answers:
            listener.listen()

            def answer() -> None:
                connection, _ = listener.accept()
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()

            threading.Thread(target=answer, daemon=True).start()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize(("answers", "why"), [(False, "refused"), (True, "something else")])
def test_nothing_at_the_address(
    scheme: str, answers: bool, why: str, source: Path, tmp_path: Path
) -> None:
    """Said at once, and before an old checkpoint is given up."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    started = time.monotonic()
    with port(answers) as number:
        where = f"{scheme}127.0.0.1:{number}"
        message = refusal("quantize", source, tmp_path / "out", "--overwrite", "--ray", where)
    assert f"--ray {where}: no cluster there" in message
    assert why in message
    assert time.monotonic() - started < 15
    assert everything(tmp_path / "out") == {"config.json": b"{}"}


def test_a_proxy_for_the_web_is_not_asked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    with cluster.connected(address):
        import ray

        assert ray.is_initialized()


@pytest.mark.parametrize("text", ["nonsense", "host:", ":6379", "ray://host", "host:99999"])
def test_what_is_no_address(text: str, source: Path, tmp_path: Path) -> None:
    assert f"--ray {text} is neither auto" in refusal(
        "quantize", source, tmp_path / "out", "--ray", text
    )
    assert not (tmp_path / "out").exists()


def test_a_device_and_a_cluster(source: Path, tmp_path: Path) -> None:
    words = ("quantize", source, tmp_path / "out", "--ray", "auto", "--device", "cpu")
    assert "--device" in refusal(*words, code=2)


def test_ray_is_not_installed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    message = refusal("quantize", source, tmp_path / "out", "--ray", "auto")
    assert "pip install 'ray" in message


def test_machines_that_are_not_alike(
    address: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source or target that a node does not see, other contents, more threads than it has, and a
    target of the same name that is not the same folder."""
    here = tmp_path / "source"
    shutil.copytree(source, here)
    out = tmp_path / "out"
    (out / FOLDER).mkdir(parents=True)
    with Checkpoint(here) as checkpoint, cluster.connected(address):
        steps = plan(checkpoint, Options())
        record = Record(out, steps.fingerprint(checkpoint))

        def attempt(threads: int | None = None) -> str:
            with pytest.raises(QuantizeError) as caught:
                cluster.make_shards_on_ray(
                    address, checkpoint, steps, record, [0], threads, lambda _: None
                )
            return str(caught.value)

        assert "no machine of the Ray cluster has more than 1 CPUs" in attempt(threads=2)
        out.rename(tmp_path / "elsewhere")
        assert f"does not see {out}; source and target must be on storage" in attempt()
        (tmp_path / "elsewhere").rename(out)
        here.rename(tmp_path / "elsewhere")
        assert f"does not see {here}; source and target must be on storage" in attempt()
        shutil.copytree(source, here)
        config = json.loads((here / "config.json").read_text())
        (here / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
        assert f"sees another source in {here}, or has another version" in attempt()
        assert not any(out.glob("*.safetensors"))

        shutil.rmtree(here)
        shutil.copytree(source, here)
        monkeypatch.setattr(cluster, "SETTLE", 0.0)
        monkeypatch.setattr(cluster, "is_done", lambda *_: False)  # as if out were not shared
        assert "was written by another machine and is not here" in attempt()
        assert (out / "model.safetensors").exists()
