# `make demo` and `make test` are all that a newcomer needs; `make help` lists the rest.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# with lmms-eval, over that one
EVALUATION ?= .venv-evaluation
SLOW   := slow or slurm or scale
# two test files at a time; `make test JOBS=0` runs them one after the other
JOBS   ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help env env-evaluation demo test test-slow test-gpu test-all golden lint format docs bench slurm-sandbox

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: $(READY)  ## make the environment (.venv) from the pinned requirements

$(READY): envs/requirements.txt envs/make_venv.sh
	PYTHON=$(PYTHON) bash envs/make_venv.sh $(VENV)

env-evaluation: $(EVALUATION)/.ready  ## make the environment with lmms-eval over it, for tasks of kind: lmms

$(EVALUATION)/.ready: $(READY) envs/requirements-evaluation.txt envs/make_overlay.sh
	bash envs/make_overlay.sh $(EVALUATION) $(VENV) --no-deps -r envs/requirements-evaluation.txt
	touch $@

demo: env  ## run the whole workflow on the embedded demo (CPU, offline, minutes)
	$(BIN)/snakemake

test: env  ## the fast tests
	$(PYTEST) -m "not ($(SLOW))"

test-slow: env  ## real trainings, the real Snakefile, a real Slurm where it is installed
	$(PYTEST) --no-loadscope-reorder -m "$(SLOW)"

test-gpu: env  ## what needs a CUDA GPU; says so where there is none
	$(BIN)/python -m pytest -m gpu

test-all: test test-slow  ## everything

golden: env  ## compare with recordings of the original LLaVA: make golden REFERENCE=folder
	$(BIN)/python -m pytest tests/golden --reference $(REFERENCE)

lint: env  ## ruff, snakefmt, snakemake --lint, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint
	$(BIN)/mypy

format: env  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules

docs: env  ## regenerate the JSON schema and the configuration reference
	$(BIN)/python -m workflow_scripts.config.reference

slurm-sandbox: env  ## a shell with a private Slurm: two virtual nodes, pretended GPUs (root, Debian's slurm packages)
	$(BIN)/python -m tests.slurm.sandbox $(ARGS)

bench: env  ## every benchmark, with the ratio against what one would run instead
	$(BIN)/python -m benchmarks
