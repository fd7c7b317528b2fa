"""The operators' pages and the deployment examples against vLLM's own parsers, names and code."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest
import typer
import yaml  # type: ignore[import-untyped]

from tests.conftest import ROOT
from vllm_nvfp4_moe import settings

PAGE = ROOT / "docs" / "operators" / "serving.md"
PAGES = (PAGE, ROOT / "docs" / "operators" / "minimax-m3.md")
DOCS = (
    *PAGES,
    ROOT / "docs" / "users" / "quantizing.md",
    ROOT / "docs" / "users" / "troubleshooting.md",
    ROOT / "README.md",
)
CONTAINERFILE = ROOT / "examples" / "Containerfile"
MANIFEST = ROOT / "examples" / "kubernetes.yaml"


def vllm_folder() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@cache
def serve_parser() -> Any:
    from vllm.entrypoints.cli.serve import make_arg_parser  # which moves between versions
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def serve(arguments: list[str]) -> Any:
    """What ``vllm serve`` makes of ``arguments``; fails the test if it refuses them."""
    known, unknown = serve_parser().parse_known_args(arguments)
    assert unknown == []
    return known


def outside_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def code(text: str) -> list[str]:
    """The lines of all code blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def inline(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", outside_code(text))


def commands(first: str) -> list[list[str]]:
    """Of the operators' pages, those that begin with ``first``, as words without it."""
    lines = [line for page in PAGES for line in code(page.read_text())]
    found = [line.split("  #")[0] for line in lines if line.startswith(first)]
    assert found
    return [shlex.split(line.removeprefix(first)) for line in found]


@pytest.mark.parametrize(
    "words", commands("vllm serve"), ids=lambda words: " ".join(words[2:])[-40:]
)
def test_vllm_parses_each_serve_command(words: list[str]) -> None:
    args = serve(words)
    assert args.quantization == "nvfp4_moe"
    assert (args.nnodes > 1) == ("--master-addr" in words)
    assert args.headless == (args.node_rank > 0)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_flags_in_text_exist(page: Path) -> None:
    from quantize.cli.app import app

    group: Any = typer.main.get_command(app)
    ours = {o for c in group.commands.values() for p in c.params for o in p.opts + p.secondary_opts}
    theirs = set(serve_parser()._option_string_actions)
    # Of examples/setup_vllm_cpu.py, docker, vllm_nvfp4_moe.build and pip.
    other = {"--name-it-vllm", "--gpus", "--cuda", "--cpu", "--to"}
    other |= {"--no-deps", "--no-build-isolation"}
    flags = {f for text in inline(page.read_text()) for f in re.findall(r"--[a-z][\w-]*", text)}
    assert flags
    assert flags - ours - theirs - other == set()


def test_values_given_for_moe_backend_are_for_nvfp4() -> None:
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import map_nvfp4_backend

    (row,) = [line for line in PAGE.read_text().splitlines() if "| `--moe-backend` |" in line]
    named = re.findall(r"`([a-z_]+)`", row)
    assert {"marlin", "humming"} <= set(named)
    for name in named:
        if name != "auto":
            map_nvfp4_backend(name)  # raises for any other


def test_variables_exist() -> None:
    from vllm import envs

    sources = [*(ROOT / "quantize").rglob("*.py"), *(ROOT / "vllm_nvfp4_moe").rglob("*.py")]
    ours = "\n".join(file.read_text() for file in sources)
    named = {
        n
        for page in (*DOCS, MANIFEST)
        for n in re.findall(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b", page.read_text())
    }
    named |= {entry["name"] for entry in container()["env"]} | set(image_environment())
    named -= {"HOME", "USER"}
    assert {"VLLM_PLUGINS", "NVFP4_MOE_SELF_CHECK"} <= named
    for name in named:
        if name.startswith("VLLM_"):
            assert name in envs.environment_variables, name
        elif name.startswith("HF_"):
            assert hasattr(hub, name), name
        else:
            assert f'"{name}"' in ours, name


def test_what_a_key_does_not_guard() -> None:
    """vLLM's own list, and a path outside it that answers prompts and is always there."""
    from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

    (row,) = [line for line in PAGE.read_text().splitlines() if "| `--api-key` |" in line]
    guarded, left = re.fullmatch(r".*Guards `(.+?)`\..* also `(.+?)`,.*", row).groups()  # type: ignore[union-attr]
    assert guarded in GUARDED_PREFIX
    assert not left.startswith(GUARDED_PREFIX)
    routers = vllm_folder() / "entrypoints" / "launchers" / "api_server" / "routers.py"
    router = vllm_folder() / "entrypoints" / "serve" / "sagemaker" / "api_router.py"
    assert "    register_sagemaker_api_router(app" in routers.read_text()
    assert f'"{left}"' in router.read_text()


def test_metrics_exist() -> None:
    named = set(re.findall(r"vllm:(\w+)", PAGE.read_text()))
    assert len(named) > 10
    for name in named:
        base = re.sub(r"_(total|bucket|sum|count)$", "", name)
        command = [
            "grep",
            "-rlE",
            "--include=*.py",
            f'"vllm:({name}|{base})"',
            str(vllm_folder() / "v1"),
        ]
        assert subprocess.run(command, capture_output=True, check=False).stdout, name


def test_log_lines_that_operators_look_for_exist() -> None:
    lines = ["Initializing a V1 LLM engine", "Available KV cache memory", "KV cache size: "]
    for line in lines:
        assert any(line.removesuffix(": ") in page.read_text() for page in PAGES)
        command = ["grep", "-rlF", "--include=*.py", line, str(vllm_folder() / "v1")]
        assert subprocess.run(command, capture_output=True, check=False).stdout, line


def makefile_version() -> str:
    (found,) = re.findall(r"^VLLM +:= (\S+)$", (ROOT / "Makefile").read_text(), flags=re.M)
    return str(found)


def test_one_version_of_vllm_everywhere() -> None:
    version = makefile_version()
    assert f"/vllm-openai:v{version}\n" in CONTAINERFILE.read_text()
    assert f"startswith('{version}')" in CONTAINERFILE.read_text()
    pinned = re.findall(r"vllm(?:==|/vllm-openai:v)([\d.]+\d)", PAGE.read_text())
    assert pinned and set(pinned) == {version}


def test_container_file_copies_all_that_building_the_package_needs(tmp_path: Path) -> None:
    """A wheel is built from just those files, and has the plugin's entry point."""
    for line in re.findall(r"^COPY (.*)$", CONTAINERFILE.read_text(), flags=re.M):
        *sources, target = line.split()
        for source in sources:
            place = tmp_path / target.lstrip("/")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.mkdir(exist_ok=True)
                shutil.copy(ROOT / source, place)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(tmp_path / "src")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "nvfp4_moe = vllm_nvfp4_moe:register" in archive.read(points).decode()
        packed = {name for name in names if name.endswith(".py")}
    tracked = ["git", "ls-files", "quantize/*.py", "vllm_nvfp4_moe/*.py"]
    ours = subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(ours.split()) <= packed


def manifest() -> tuple[dict[str, Any], dict[str, Any]]:
    deployment, service = yaml.safe_load_all(MANIFEST.read_text())
    return deployment, service


def container() -> dict[str, Any]:
    deployment, _ = manifest()
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(found)


def test_kubernetes_arguments_are_ones_vllm_takes() -> None:
    of = container()
    assert of["command"] == ["vllm", "serve"]
    args = serve(of["args"])
    assert args.quantization == "nvfp4_moe"
    gpus = of["resources"]["limits"]["nvidia.com/gpu"]
    assert str(args.tensor_parallel_size) == gpus == of["resources"]["requests"]["nvidia.com/gpu"]
    mounts = {mount["mountPath"] for mount in of["volumeMounts"]}
    assert any(args.model_tag.startswith(f"{mount}/") for mount in mounts)
    deployment, _ = manifest()
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert args.shutdown_timeout < grace
    probe = of["startupProbe"]
    ready = next(e["value"] for e in of["env"] if e["name"] == "VLLM_ENGINE_READY_TIMEOUT_S")
    assert (
        probe["periodSeconds"] * probe["failureThreshold"] > int(ready) + 60
    )  # imports come first
    # What the comment says of the disk leaves some ten minutes for all but reading.
    (rate,) = re.findall(r"enough at (\d+) MB/s", MANIFEST.read_text())
    assert 260.3e9 / (int(rate) * 1e6) + 600 < int(ready)


def instruction(name: str) -> list[str]:
    """The arguments of all of the container file's instructions of this name."""
    text = CONTAINERFILE.read_text().replace("\\\n", "")
    return re.findall(rf"^{name} (.*)$", text, flags=re.M)


def image_environment() -> dict[str, str]:
    words = [word for line in instruction("ENV") for word in line.split()]
    return dict(word.split("=", 1) for word in words)


def test_the_image_has_the_kernels_where_its_server_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no volume hides them."""
    from vllm_nvfp4_moe import build

    (command,) = [line for line in instruction("RUN") if "vllm_nvfp4_moe.build" in line]
    made: list[tuple[str, Path]] = []
    monkeypatch.setattr(build, "make", lambda unit, folder: made.append((unit.name, folder)))
    monkeypatch.setattr(build.jit, "make_folder", lambda folder: None)
    monkeypatch.setattr(build.jit, "check_safe", lambda folder: None)
    assert build.main(shlex.split(command.removeprefix("python3 -m vllm_nvfp4_moe.build "))) == 0
    assert {folder for _, folder in made} == {Path(image_environment()[settings.CACHE])}
    assert len(made) == len(list(build.cuda())) and "HOPPER" in made[0][0]
    assert settings.CACHE not in {entry["name"] for entry in container()["env"]}
    for mount in container()["volumeMounts"]:
        assert not image_environment()[settings.CACHE].startswith(mount["mountPath"])


def test_any_user_and_a_read_only_file_system() -> None:
    """What is written lies in volumes; the image sets the user that the pod asks for."""
    deployment, _ = manifest()
    pod, of = deployment["spec"]["template"]["spec"], container()
    user = pod["securityContext"]["runAsUser"]
    assert pod["securityContext"]["runAsNonRoot"] is True and user > 0
    assert instruction("USER") == [f"{user}:{pod['securityContext']['runAsGroup']}"]
    assert of["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    # Of a Service called vllm, the cluster would set VLLM_PORT to an address.
    assert pod["enableServiceLinks"] is False
    writable = [m["mountPath"] for m in of["volumeMounts"] if not m.get("readOnly")]
    assert {"/tmp", "/dev/shm"} < set(writable)
    environment = image_environment()
    assert environment["USER"]  # else Python looks for the user's name in /etc/passwd
    for name in ("HOME", "VLLM_CACHE_ROOT"):
        assert any(environment[name].startswith(f"{place}/") for place in writable), name
    assert instruction("WORKDIR")[0] in writable


def test_kubernetes_parts_fit_together() -> None:
    deployment, service = manifest()
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    of = container()
    ports = {port["name"]: port["containerPort"] for port in of["ports"]}
    assert [port["targetPort"] for port in service["spec"]["ports"]] == ["http"]
    assert ports["http"] == serve(of["args"]).port
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(ports["http"])
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert of[kind]["httpGet"] == {"path": "/health", "port": "http"}
    # The default is a second, and the process that answers also reads long prompts.
    for kind in ("readinessProbe", "livenessProbe"):
        assert of[kind]["timeoutSeconds"] >= 5
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    assert {mount["name"] for mount in of["volumeMounts"]} == volumes
    assert "/dev/shm" in {mount["mountPath"] for mount in of["volumeMounts"]}
