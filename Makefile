# One virtual environment, made once and again when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DEVICE ?= cuda

.PHONY: demo test nightly bench support gpu figures

demo: $(READY)  ## tune resnet18 on real data, against the same network untuned
	$(BIN)/python examples/demo.py --out out/demo

test: $(READY)  ## tests, then lint and types
	$(BIN)/python -m pytest
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

nightly: $(READY)  ## the tests that take hours: every model of torchvision
	$(BIN)/python -m pytest -m nightly

support: $(READY)  ## docs/support.md: which models transform, how, and with what error; goes on where it stopped
	$(BIN)/python -m benchmarks.support

bench: $(READY)  ## overhead against plain training, three processes, their medians
	$(BIN)/python -m benchmarks.overhead

figures: $(READY)  ## the figures and tables of README and docs from benchmarks/results
	$(BIN)/python -m benchmarks.ridge
	$(BIN)/python -m benchmarks.tables

gpu:  ## on a machine with CUDA and the dependencies installed; nothing is downloaded
	PYTHONPATH=. $(PYTHON) -m pytest -m cuda tests
	PYTHONPATH=. $(PYTHON) -m benchmarks.overhead --device $(DEVICE) --batch-size 128

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
