# `make demo` runs the main job on shipped data, `make test` lints, types and tests; both make .venv first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-frozen test test-allennlp test-tensorflow check experiments environment clean

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

# Two at a time, each with one thread: most tests are small, and many wait for processes that they start.
PYTEST := python -m pytest -n 2 --dist worksteal

test: check
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

# AllenNLP asks for an old torch but runs with this one, if its own requirements are not looked at. Its environment also is
# the low end of the range of transformers, so the tests of models run in it too. 6.5 GB.
ALLENNLP ?= .venv-allennlp
$(ALLENNLP)/.ready: pyproject.toml $(wildcard tests/requirements-allennlp*.txt) tests/requirements-nodeps.txt
	test -x $(ALLENNLP)/bin/python || $(PYTHON) -m venv $(ALLENNLP)
	$(ALLENNLP)/bin/pip install --quiet --requirement tests/requirements-allennlp-torch.txt
	$(ALLENNLP)/bin/pip install --quiet 'setuptools<81' wheel 'transformers==4.49.0' 'huggingface_hub<1'
	$(ALLENNLP)/bin/pip install --quiet --no-deps --no-build-isolation --requirement tests/requirements-allennlp-nodeps.txt
	$(ALLENNLP)/bin/pip install --quiet --requirement tests/requirements-allennlp.txt
	$(ALLENNLP)/bin/pip install --quiet --editable '.[test]' 'transformers==4.49.0' 'huggingface_hub<1' --requirement tests/requirements-allennlp-torch.txt
	$(ALLENNLP)/bin/pip install --quiet --no-deps --requirement tests/requirements-nodeps.txt
	touch $@

test-allennlp: $(ALLENNLP)/.ready
	OMP_NUM_THREADS=1 $(ALLENNLP)/bin/$(PYTEST) tests/interop tests/adapters tests/integrations tests/tasks

# TensorFlow and AllenNLP do not run in one process, so this has its own environment too.
TENSORFLOW ?= .venv-tensorflow
$(TENSORFLOW)/.ready: pyproject.toml constraints.txt
	test -x $(TENSORFLOW)/bin/python || $(PYTHON) -m venv $(TENSORFLOW)
	$(TENSORFLOW)/bin/pip install --quiet --constraint constraints.txt torch
	$(TENSORFLOW)/bin/pip install --quiet --editable '.[test,tensorflow]'
	touch $@

test-tensorflow: $(TENSORFLOW)/.ready
	$(TENSORFLOW)/bin/python -m pytest tests/data_scripts

# The recipes with measured results, one after the other; hours.
experiments: environment
	for recipe in recipes/*.yaml; do $(BIN)/nlpinf run $$recipe || exit 1; done

clean:
	rm -rf $(VENV) $(ALLENNLP) $(TENSORFLOW) demo demo-frozen
