"""For the process that others are forked from (``processes.py``): does once what is slow."""

import io
from contextlib import redirect_stderr, suppress

import torch

from quantize import execute, inspection, verify
from quantize.cli import app as cli
from quantize.nvfp4.kernels import for_device
from quantize.nvfp4.kernels.kernel import quantize_weights
from quantize.report import page

assert execute and inspection and verify  # the command imports them when it runs
torch.set_num_threads(1)
quantize_weights([torch.ones(16, 16, dtype=torch.bfloat16)], "max", for_device(torch.device("cpu")))
page._template()  # jinja2 compiles it
with suppress(SystemExit), redirect_stderr(io.StringIO()):
    cli.app(["quantize", "/nowhere", "/nowhere/out"])  # what reads words is imported
