# Needs Python 3.11 or newer and make. A C++ compiler (g++) makes CPUs several times faster; without one torch's kernels serve.
# `make help` says what there is.
#
# Without an NVIDIA GPU, constraints/cpu.txt pins the version of torch. Where the configured package index has no CPU build of
# it, point pip at PyTorch's CPU wheels (their address: pytorch.org/get-started):
#     make serve PIP_ARGS="--extra-index-url ADDRESS"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PIP_ARGS ?=
TEST_WORKERS ?= 2

BIN := $(VENV)/bin
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints/cpu.txt)
PIP_INSTALL := $(BIN)/python -m pip install --quiet $(CONSTRAINTS) $(PIP_ARGS)

.PHONY: help install serve generate chat bench bench-cpu bench-gpu docs test test-gpu lint clean

help:
	@echo 'make serve     serve the bundled model on 127.0.0.1:8000   ARGS="--port 8123" passes options on'
	@echo 'make generate  complete a prompt                           ARGS="\"Once upon a time\""'
	@echo 'make chat      talk to the model in the terminal'
	@echo 'make bench     measure offline throughput                  ARGS="--num-prompts 100"'
	@echo 'make bench-cpu compare with other engines on the CPU       ARGS="--llama-cpp FOLDER --rounds 1"'
	@echo 'make bench-gpu measure one NVIDIA GPU, two model shapes    ARGS="--model A"'
	@echo 'make test-gpu  run the tests of GPU kernels on a GPU'
	@echo 'make docs      build the pages of docs/ as a site in site/'
	@echo 'make test      install what tests need, run them all       ARGS="tests/scheduler -x" runs fewer'
	@echo 'make lint      ruff and mypy only'
	@echo 'make clean     remove the installation and caches'
	@echo
	@echo 'Variables: PYTHON=python3.12 (which Python), PIP_ARGS="..." (further arguments of pip install)'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'make: Python 3.11 or newer is needed; name one with make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps make pip run again only when what is to be installed has changed.
$(VENV)/.installed: pyproject.toml constraints/cpu.txt | $(BIN)/python
	$(PIP_INSTALL) --editable .
	$(BIN)/python -m minivllm.kernels.cpu.build
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP_INSTALL) --editable '.[test]'
	@touch $@

install: $(VENV)/.installed

serve: install
	$(BIN)/mini-vllm serve $(ARGS)

generate: install
	@$(BIN)/mini-vllm generate $(ARGS)

chat: install
	@$(BIN)/mini-vllm chat $(ARGS)

bench: install
	$(BIN)/mini-vllm bench throughput $(ARGS)

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP_INSTALL) --editable '.[bench]'
	@touch $@

bench-cpu: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.cpu.run $(ARGS)

bench-gpu: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu.run $(ARGS)

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP_INSTALL) --editable '.[docs]'
	@touch $@

# Not --quiet: a strict build counts the warnings that it logs. The variable keeps the theme's announcements out of them.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)
	@echo 'The site is in site/; to read it: python3 -m http.server --directory site'

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

# One thread per worker: two workers with all cores each would wait for each other's threads.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(ARGS)

# The kernels' tests compiled, on the GPU; without MINIVLLM_TEST_GPU they run in Triton's interpreter.
GPU_TESTS := tests/kernels/triton_kernels tests/attention/test_triton.py tests/runner/test_device_runner.py \
  tests/runner/test_rehearsal.py tests/models/test_loader.py tests/parity/test_device.py tests/engine/test_compiling.py
test-gpu: $(VENV)/.installed-test
	MINIVLLM_TEST_GPU=1 $(BIN)/python -m pytest -n 8 $(GPU_TESTS) $(ARGS)

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
