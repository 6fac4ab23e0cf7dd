# StreamKV: everything a newcomer needs. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=

.PHONY: help install serve chat test smoke lint format bench mutants kernels-planted kernels-resources contract-cuda cpu-sanitize gpu-check compose-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

install: $(STAMP)  ## create .venv with everything in it

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

serve: install  ## serve the model in the box on 127.0.0.1:8000
	@$(BIN)/streamkv serve --host $(HOST) --port $(PORT) $(ARGS)

chat: install  ## talk to a running server
	@$(BIN)/streamkv chat $(ARGS)

test: install  ## run the whole test suite
	@$(BIN)/python -m pytest $(ARGS)

smoke: install  ## run the smoke tests against a built wheel, away from the sources
	@$(BIN)/python tests/house/wheel_smoke.py

lint: install  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: install  ## let ruff rewrite
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

mutants: install  ## plant bugs one by one; every one must turn a test red
	@$(BIN)/python tests/mutants/run.py

kernels-planted: install  ## plant bugs in the CUDA kernels; the emulator or its tests must notice every one
	@$(BIN)/python -m tests.kernels.planted $(ARGS)

kernels-resources: install  ## compile every CUDA kernel for every GPU; writes kernels_cuda/resources.md, where nothing may spill
	@$(BIN)/python -m tests.kernels.resources

contract-cuda: install  ## the whole backend contract over CUDA kernels in the emulator
	@$(BIN)/python -m streamkv_backends.contract cuda --device emulated $(ARGS)

cpu-sanitize: install  ## the cpu backend's tests over kernels that g++ checks for memory, undefined behaviour and races
	@$(BIN)/python -m tests.backends.cpu.sanitize

bench: install  ## the short benchmarks; docs/benchmarks.md lists all
	@$(BIN)/python -m benchmarks.core
	@$(BIN)/python -m benchmarks.server

gpu-check: install  ## everything that only a GPU can tell, within 9 minutes (docs/gpu/README.md)
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

compose-check: install  ## build and try the containers for real, with docker or podman (docs/deploy.md)
	@$(BIN)/python -m tests.containers.check $(ARGS)

clean:  ## remove what was built
	@rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
