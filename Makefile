# make train            runs the main job (ARGS="tiny --plan" adds flags)
# make test             runs the tests
# make check            format, lint, types, import law, packages
# make oracle           compares with Hugging Face transformers itself; installs a CPU build of torch
# make bench            runs the benchmarks
# make docs             builds the documentation into site/
# make screenshots      takes the pictures of the documentation anew, with the Chromium of this machine
# make lock             writes the lock files anew (UPGRADE=1 moves versions)
#
# Needs: python3 (3.11 to 3.13, with venv), make. Everything else is installed into .venv by the first command,
# hash-checked; inside an activated virtual environment it is installed there.
VENV   ?= $(or $(VIRTUAL_ENV),.venv)
LOCK   ?= requirements.lock
ARGS   ?=
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,13))' 2>/dev/null && echo $$p && break; done)
BIN    := $(VENV)/bin
PY     := $(BIN)/python
READY  := $(VENV)/.ready
UV     := $(BIN)/uv
# What the environment was made from: unchanged means nothing to install.
KEY     = { cat $(LOCK) pyproject.toml; pwd; $(PY) -VV; } | $(PY) -c 'import sys,hashlib; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'

export TF_CPP_MIN_LOG_LEVEL ?= 2
export TF_ENABLE_ONEDNN_OPTS ?= 0
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export DO_NOT_TRACK ?= 1

.PHONY: train test slow oracle check docs screenshots format bench lock setup
.DELETE_ON_ERROR:

train: setup ; @$(PY) flows/train.py $(ARGS)
# Programs of the tests are small: the compiler takes half the time with few optimizations. `make slow` and `make oracle` have all.
test:  setup ; @XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not oracle" $(ARGS)
slow:  setup ; @$(PY) -m pytest -q -m "slow" $(ARGS)
bench: setup ; @$(PY) benchmarks/run.py $(ARGS)

# torch is no dependency, nor is accelerate, which lm-eval's own backend needs. This version of torch has a small build for CPU, which pip prefers wherever it finds one; 2.14's CUDA build crashed beside JAX.
oracle: setup
	@$(PY) -c 'import torch, transformers, accelerate' 2>/dev/null || \
	  $(PY) -m pip install -q --disable-pip-version-check 'torch==2.13.*' accelerate
	@$(PY) -m pytest -q -m "oracle" $(ARGS)

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(PY)
	@$(BIN)/lint-imports
	@$(UV) pip check -q --python $(PY)

docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q
	@echo "docs: site/index.html"

screenshots: setup
	@PREFECT_LLAMA_SCREENSHOTS=docs/images $(PY) -m pytest -q -m slow tests/test_ui.py

format: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

setup: $(READY)

$(PY):
	@[ -n "$(PYTHON)" ] || { echo "setup: no Python 3.11 to 3.13 on PATH (set PYTHON=...)"; exit 1; }
	@echo "setup: $(VENV) from $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "setup: this Python has no venv module (Debian: apt install python3-venv)"; exit 1; }

$(UV): bootstrap.lock | $(PY)
	@echo "setup: uv (hash-checked)"
	@$(PY) -m pip install -q --disable-pip-version-check --require-hashes -r bootstrap.lock
	@touch $@

$(READY): $(LOCK) pyproject.toml | $(UV)
	@k=$$($(KEY)); if [ "$$k" = "$$(cat $@ 2>/dev/null)" ]; then touch $@; else \
	  echo "setup: installing $(LOCK) (about 5 GB the first time)"; \
	  $(UV) pip $(if $(VIRTUAL_ENV),install,sync) -q --compile-bytecode --require-hashes --python $(PY) $(if $(VIRTUAL_ENV),-r) $(LOCK) && \
	  $(UV) pip install -q --no-deps --no-build-isolation --python $(PY) -e . && \
	  echo $$k > $@ && echo "setup: done"; fi

COMPILE = UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) pip compile -q --universal --fork-strategy fewest \
  --generate-hashes --no-emit-index-url --no-annotate --python-version 3.11 $(if $(UPGRADE),--upgrade)
# libtpu is among them: it is the compiler that `python -m model.preflight` asks, on machines without a TPU too.
EXTRAS  = hf eval track fast dask quantized tpu
lock: | $(UV)
	@$(COMPILE) pyproject.toml --group dev --group docs $(EXTRAS:%=--extra %) -o requirements.lock
	@$(COMPILE) bootstrap.in -o bootstrap.lock
	@! grep -nE '://|^-' requirements.lock bootstrap.lock
	@echo "lock: $$(grep -c == requirements.lock) packages, no URL"
