# Two commands: `make reproduce` and `make test`. Both build .venv when it is missing.
PYTHON ?= python3
PIP_FLAGS ?=
OUT ?= report
BIN := .venv/bin
# One thread a process: the suite and the probes run processes side by side.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: reproduce full test lint types tests notebooks gpu clean

reproduce: .venv/installed
	$(BIN)/lorascope reproduce --quick -o $(OUT)

full: .venv/installed
	$(BIN)/lorascope reproduce -o $(OUT)-full

test: lint types tests

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

tests: .venv/installed
	$(BIN)/pytest -n 2
	$(BIN)/pytest -m ray  # by itself: a cluster takes the whole machine

notebooks: .venv/installed
	$(BIN)/pytest --nbmake --nbmake-timeout=900 notebooks

gpu: .venv/installed
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python -m pytest -n 0 -m cuda tests/test_cuda.py && $(BIN)/python benchmarks/gpu.py; \
	else echo "no CUDA device: nothing to test or measure"; fi

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lorascope needs Python 3.11 or newer; set PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "no venv module: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
