# One spelling for people and CI. `make setup` needs Python 3.11 or newer and a C compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
KEEP ?=
TODAY := $(shell date +%F)
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: setup demo test lint format bench docs down

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, found {sys.version.split()[0]}. Run: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,fast]'
	@touch $@

demo: setup
	$(BIN)/raysmith demo $(if $(KEEP),--keep)

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks.training --quick --json benchmarks/results/$(TODAY)-training-quick.json
	$(BIN)/python -m benchmarks.serving --quick --json benchmarks/results/$(TODAY)-serving-quick.json

docs: setup
	$(BIN)/python docs/generate.py

down: setup
	$(BIN)/raysmith down --all
