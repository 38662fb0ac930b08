# `make demo` runs the main job on shipped data, `make test` lints, types and tests; both make .venv first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test check experiments environment clean

environment: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt tests/requirements-nodeps.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps --requirement tests/requirements-nodeps.txt
	touch $@

demo: environment
	$(BIN)/nlpinf demo

check: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

experiments: environment
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) demo
