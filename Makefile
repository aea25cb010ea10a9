# Every target works on a fresh clone; VENV, PYTHON and the other variables can be overridden:
#   make test VENV=/elsewhere/venv PYTHON=python3.12 PYTEST_ARGS="-k kronecker -x"

PYTHON ?= python3
VENV ?= .venv
DEMO ?= examples/demo.py
PYTEST_ARGS ?=
WORKERS ?= logical

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALL := $(PIP) install -c constraints.txt
# One process for each processor; a test keeps to one thread.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help env demo test test-all coverage lint format docs bench rivals clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(VENV)/.installed ## create the environment in VENV (.venv): the package, editable, and its tools

# torch comes alone and first: it is by far the largest, and a failure shows at once.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e '.[dev]'
	@touch $@

demo: env ## fit a small task and show which symmetry was learned
	$(BIN)/python $(DEMO)

test: env ## the quick tests
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: env ## every test, the quick and the slow
	$(PYTEST) $(PYTEST_ARGS)

coverage: env ## the quick tests, with the lines that they do not reach
	$(BIN)/coverage run -m pytest -m "not slow" $(PYTEST_ARGS)
	$(BIN)/coverage report

lint: env ## rules, format and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env ## put the code in the format that lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs ## build the pages into docs/_build/html and run the examples, eight minutes; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

$(VENV)/.docs: $(VENV)/.installed
	$(INSTALL) -e '.[docs]'
	@touch $@

bench: env ## short versions of the benchmarks, ten minutes; rewrites its tables in docs/benchmarks.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/report.py

# torchvision comes along with laplace-torch, which needs nothing of it. The one that the index has
# does not load beside a torch for the CPU, and laplace-torch does not load beside that.
rivals: env ## add laplace-torch and its backends, which benchmarks/factors.py compares with
	$(INSTALL) -e '.[benchmark]'
	$(PIP) uninstall --yes torchvision

clean: ## remove what was built or cached; the environment stays
	rm -rf build dist *.egg-info docs/_build docs/generated docs/examples docs/sg_execution_times.rst
	rm -rf .coverage
	rm -rf .pytest_cache .ruff_cache .mypy_cache
	find sklearn_softeq tests -name __pycache__ -type d -prune -exec rm -rf {} +
