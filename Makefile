# `make reproduce` and `make test` build .venv if it is missing. `make test-all` adds the slow tests.
PYTHON ?= python3
TORCH_INDEX ?=
OUT ?= report
BIN := .venv/bin
# One thread per process: the suite and the probes run processes in parallel.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
# Without cached bytecode, each process compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

# Types and shapes of all arguments, checked at every call: doubles the time of the suite.
CHECKED := --jaxtyping-packages="lorascope,beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
CONTRACTS := $(addprefix tests/contract/test_,exporters.py formats.py methods.py observers.py)
NUMBERS := "numbers and not (slow or ray or browser or cuda)"

.PHONY: reproduce full test test-all lint types tests slow complete ray numbers docs notebooks gpu clean

reproduce: .venv/installed
	$(BIN)/lorascope reproduce -o $(OUT)

full: .venv/installed
	$(BIN)/lorascope reproduce --evidence data/evidence-2 -o $(OUT)-full

test: lint
	@$(MAKE) --no-print-directory -j 2 types tests

test-all: lint
	@$(MAKE) --no-print-directory -j 2 types slow
	@$(MAKE) --no-print-directory ray

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python docs/_ext/write_pages.py --check
	$(BIN)/python tests/name_budget.py

types: .venv/installed
	@found=$$($(BIN)/mypy 2>&1); code=$$?; echo "mypy: $$found"; exit $$code

tests: .venv/installed
	$(BIN)/pytest -n 2 --dist worksteal

slow: .venv/installed
	$(BIN)/pytest $(CHECKED) -n 2 --dist worksteal -m "not ray"

# The tests of `slow`, with types and shapes checked in these contracts only, which call every method and format.
complete: .venv/installed
	$(BIN)/pytest $(CHECKED) -n 2 --dist worksteal -m "not ray" $(CONTRACTS)
	$(BIN)/pytest -n 2 --dist worksteal -m "not ray" $(CONTRACTS:%=--ignore=%)

# By itself: a cluster takes the whole machine.
ray: .venv/installed
	$(BIN)/pytest -m ray

# Elementwise operations without vector instructions, and products of matrices with those of AVX2.
numbers: .venv/installed
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/pytest -n 2 --dist worksteal -m $(NUMBERS)

# Runs the notebooks, the guides and the examples of the gallery; a warning is an error.
docs: .venv/installed
	$(BIN)/python docs/_ext/update_readme.py
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html
	@echo "the site: docs/_build/html/index.html"

# Runs the notebooks and stores their outputs in them; `make docs` runs them again and compares.
notebooks: .venv/installed
	$(BIN)/python docs/_ext/notebook_outputs.py

gpu: .venv/installed
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python -m pytest -n 0 -m cuda tests/test_cuda.py && $(BIN)/python benchmarks/gpu.py; \
	else echo "no CUDA device: nothing to test or measure"; fi

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lorascope needs Python 3.11 or newer; set PYTHON=/path/to/python"; exit 1; }
	@echo "Creating .venv and installing lorascope with its dependencies (about 2 minutes, 2.8 GB)..."
	@$(PYTHON) -m venv .venv || { echo "no venv module: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet torch --index-url $(TORCH_INDEX))
	@$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache
