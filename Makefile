# make demo and make test need only Python 3.11 (or newer) and make; they set up .venv themselves.

PYTHON ?= python3
BIN := .venv/bin

# Made after a complete installation, and older than these two files when it must be repeated.
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench clean

help:
	@echo "make demo      set up, then steer a real model"
	@echo "make test      set up, then lint, type check and run the quick tests"
	@echo "make test-all  the same with the slow tests"
	@echo "make lint      lint and type check only"
	@echo "make bench     run the benchmarks"
	@echo "make clean     remove what these commands made, .venv included"

# torch first and by itself, at its pinned version: pip then never considers another one.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "trimtab needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/trimtab demo

# Waiting OpenMP threads that spin slow down everything else that runs; and tokenizers warn about
# their own threads when a test starts a process.
test test-all bench: export OMP_WAIT_POLICY = PASSIVE
test test-all bench: export TOKENIZERS_PARALLELISM = false

test: lint
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered

test-all: lint
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv build dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
