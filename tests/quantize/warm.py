"""For the process that others are forked from (``processes.py``): does once what is slow."""

import torch

from quantize import execute, inspection, verify
from quantize.cli import app as cli
from quantize.nvfp4.kernels import for_device
from quantize.nvfp4.kernels.kernel import quantize_weights

assert cli.app and execute and inspection and verify  # the command imports them when it runs
torch.set_num_threads(1)
quantize_weights([torch.ones(16, 16, dtype=torch.bfloat16)], "max", for_device(torch.device("cpu")))
