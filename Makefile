# `make` alone lists the targets.
#
# One virtual environment, .venv, filled in two stages, so that the first answer comes soon: `make serve` installs only
# the serving stage (no torch, no onnx); `make setup`, `make test` and `make lint` add the rest on top of it. Each stage
# runs again only when pyproject.toml has changed.

VENV ?= .venv
HOST ?=
PORT ?= 8000

# Which torch is installed. pip takes it from the index you have configured; where the default build would bring
# gigabytes of GPU libraries to a machine without a GPU, name the index of PyTorch's CPU builds:
#     make setup TORCH_PIP_ARGS="--extra-index-url URL"
# Any release from 2.8 on will do: make setup TORCH=torch==2.9.1
TORCH ?= torch==2.13.0
TORCH_PIP_ARGS ?=
# What has TensorRT's headers (NvInfer*.h 10.14, Apache-2.0), to compile the plugin where TensorRT itself is not installed.
# Of that package only the headers are used, so it comes without the 290 MB compiler it asks for.
TENSORRT_HEADERS ?= kernel-lens==2.0.1

# The interpreter the environment is made of: python3 if it is new enough, else the newest one found beside it.
PYTHON ?= $(shell for candidate in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$candidate"; break; }; done)

# Arguments for pytest, e.g. make test ARGS="tests/server -k batcher"
ARGS ?=
# Where `make train` keeps its checkpoints and log, and the bundle it writes at the end: the one that `make serve` serves.
OUTPUT ?= runs/blood-cells
BUNDLE ?= models/blood-cells

BIN := $(VENV)/bin
# Compiling everything while installing takes longer than compiling, on first import, what is used.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check -qq install --no-compile
SERVING := $(VENV)/.serving
READY := $(VENV)/.ready
RAY := $(VENV)/.ray
KERNELS := $(wildcard $(foreach kind,cpp cu h inc,plugins/*/*.$(kind)))
# The library that plugins/build.py makes last: it stands for all of them.
NATIVE := plugins/built/libmsda_onnxruntime.so

.DEFAULT_GOAL := help
.PHONY: help setup native serve test test-all ray lint format train clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) $(NATIVE) ## make .venv with all that tests, training and export need

native: $(NATIVE) ## compile the attention kernels: for the CPU; with nvcc for GPUs; with TensorRT's headers its plugin

serve: $(SERVING) $(NATIVE) ## serve the embedded model at http://localhost:8000 (PORT=...)
	$(BIN)/ddetr serve --port $(PORT) $(if $(HOST),--host $(HOST))

# What computes goes two at a time, each in one thread; what measures time has the machine for itself.
COMPUTING := $(addprefix tests/,bundle cli export fuzz models parity plugins runtime samples training)

test: $(READY) $(NATIVE) ## run the tests (ARGS="tests/server -k batcher")
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(COMPUTING)
	$(BIN)/python -m pytest $(addprefix --ignore=,$(COMPUTING))
endif

test-all: $(READY) $(NATIVE) ## run the tests, the slow ones too
	$(BIN)/python -m pytest --slow $(ARGS)

ray: $(RAY) $(NATIVE) ## run the tests of deploy/ray on a local Ray, which is installed for it (700 MB)
	$(BIN)/python -m pytest tests/deploy/test_ray_serve.py tests/deploy/test_ray_batch.py $(ARGS)

lint: $(READY) ## check style, format, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(KERNELS)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(KERNELS)

# Large blocks go back to the system and come again at every step, page by page, unless glibc is told to keep them.
train: export MALLOC_MMAP_THRESHOLD_ = 2000000000
train: export MALLOC_TRIM_THRESHOLD_ = 4000000000
train: $(READY) $(NATIVE) ## retrain the embedded model: make train DATA=folder (OUTPUT=..., BUNDLE=...)
	@test -n "$(DATA)" || { echo "say where the data is: make train DATA=path/to/bccd" >&2; exit 2; }
	$(BIN)/python -m training.embedded --data "$(DATA)" --output "$(OUTPUT)"
	$(BIN)/python -m training.card --run "$(OUTPUT)" --data "$(DATA)"
	$(BIN)/python -m export.onnx_export --checkpoint "$(OUTPUT)/best.safetensors" --output "$(BUNDLE)" \
		--name blood-cells --with-checkpoint --attach "$(OUTPUT)"/card/*

clean: ## remove .venv and everything built
	rm -rf $(VENV) plugins/built build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A line tells of every library that is built or that lacks a compiler or headers; what would use it runs slower. Where
# nvcc or headers have come since: .venv/bin/python -m plugins.build
$(NATIVE): plugins/build.py $(KERNELS) | $(BIN)/python
	-@$(BIN)/python -m plugins.build

# --- the two stages ---------------------------------------------------------------------------------------------------

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
		echo "ddetr needs Python 3.11 or newer, and none was found. On Debian 12+ or Ubuntu 24.04+:" >&2; \
		echo "    sudo apt-get install python3 python3-venv" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "ddetr needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" --version 2>&1)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
		version=$$("$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "$(PYTHON) cannot make virtual environments: its venv module is missing. On Debian or Ubuntu:" >&2; \
		echo "    sudo apt-get install python3-venv      (or python$$version-venv)" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(SERVING): pyproject.toml | $(BIN)/python
	@echo "installing what serving needs into $(VENV) ..."
	@$(INSTALL) --editable .
	@touch $@

# torch comes first and by itself: the range in pyproject.toml is then satisfied and pip looks for no other build.
$(READY): pyproject.toml $(SERVING)
	@echo "installing what tests, training and export need into $(VENV): some minutes ..."
	@$(INSTALL) $(TORCH_PIP_ARGS) "$(TORCH)"
	@$(INSTALL) --editable ".[bench,export,otel,train,rtx,dev]"
	@$(INSTALL) --no-deps "$(TENSORRT_HEADERS)"
	-@$(BIN)/python -m plugins.build libmsda_tensorrt.so
	@touch $@

$(RAY): pyproject.toml $(READY)
	@echo "installing Ray into $(VENV) ..."
	@$(INSTALL) --editable ".[ray]"
	@touch $@
