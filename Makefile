# `make demo` runs the main job on shipped data, `make test` lints, types and tests; both make .venv first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-frozen test check experiments environment clean

environment: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt tests/requirements-nodeps.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps --requirement tests/requirements-nodeps.txt
	touch $@

demo: environment
	$(BIN)/nlpinf demo

demo-frozen: environment
	$(BIN)/nlpinf demo --frozen

check: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

# The recipes with measured results, one after the other; hours.
experiments: environment
	for recipe in recipes/*.yaml; do $(BIN)/nlpinf run $$recipe || exit 1; done

clean:
	rm -rf $(VENV) demo demo-frozen
