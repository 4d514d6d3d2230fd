# Every target works on a fresh machine: .venv is made with the system's Python and filled from pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := -c constraints.txt
export PYTHONHASHSEED := 0

.PHONY: help demo test test-slow lint format docs notebooks bench clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.venv/base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[plot]'
	@touch $@

.venv/dev: .venv/base
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[dev]'
	@touch $@

demo: .venv/base ## Differentiate through optimization on real digits: a table and a picture
	$(BIN)/python examples/demo.py

test: .venv/dev ## Run the tests, doctests, notebooks and the composition matrix
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-slow: .venv/dev ## Run the long tests as well
	$(BIN)/python -m pytest -n 2

lint: .venv/dev ## ruff, pyright and the import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/dev ## Build the documentation, warnings as errors
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

notebooks: .venv/dev ## Run the notebooks and store their outputs
	$(BIN)/python notebooks/run_notebooks.py

bench: .venv/base ## Run the benchmarks; results go to benchmarks/results
	$(BIN)/python benchmarks/primitives.py
	$(BIN)/python benchmarks/draws.py
	$(BIN)/python benchmarks/optimizers.py
	$(BIN)/python benchmarks/solvers.py
	$(BIN)/python benchmarks/meta.py
	$(BIN)/python benchmarks/zero_order.py
	$(BIN)/python benchmarks/multilevel.py
	$(BIN)/python benchmarks/transformers.py
	$(BIN)/python benchmarks/gpu.py

clean: ## Remove everything that the targets made
	rm -rf .venv build dist docs/_build docs/_generated docs/notebooks/*.ipynb .pytest_cache .ruff_cache .hypothesis .import_linter_cache
