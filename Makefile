# One virtual environment, made once and again when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DEVICE ?= cuda
SUITE := resnet50 vgg16 alexnet mobilenet_v3_small convnext_tiny vit_b_16 mlp
INTEGRATIONS := $(patsubst %,tests/test_%.py,lightning accelerate transformers timm frameworks)

.PHONY: demo test lint wheel oldest docs integrations nightly bench support paper gpu figures

demo: $(READY)  ## tune resnet18 on real data, against the same network untuned
	$(BIN)/python examples/demo.py --out out/demo

test: $(READY)  ## tests, then lint and types
	$(BIN)/python -m pytest
	$(MAKE) lint

lint: $(READY)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: $(READY)  ## wheel and source archive in out/dist, checked, and used in a fresh environment; RELEASE=version refuses another
	rm -rf out/dist
	$(BIN)/python -m build --outdir out/dist
	$(BIN)/twine check --strict out/dist/*
	test -z '$(RELEASE)' || test -f out/dist/fxstn-$(RELEASE)-py3-none-any.whl
	$(BIN)/python -m pytest -n 0 tests/test_package.py

oldest:  ## the tests with the lowest version of everything, torch 2.9 with Python 3.11 (downloads gigabytes)
	$(PYTHON) -m venv --clear .venv-oldest
	$(PYTHON) tests/lowest.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet --editable '.[dev]' --constraint .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pytest

docs: .venv-docs/ready  ## the site, in out/site; a warning or a broken link is an error
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs $(if $(SERVE),serve,build)

integrations: $(READY)  ## the adapters against the newest and the oldest supported version of each framework
	for versions in '' '--constraint tests/oldest.txt'; do \
		$(PYTHON) -m venv --clear .venv-integrations && \
		.venv-integrations/bin/pip install --quiet --editable '.[dev,lightning,accelerate,transformers]' 'timm>=1.0.30' pytorch-ignite skorch fastai $$versions && \
		.venv-integrations/bin/python -c 'import lightning.pytorch, accelerate, transformers, timm' && \
		.venv-integrations/bin/python -m pytest $(INTEGRATIONS) || exit 1; \
	done

nightly: $(READY)  ## the tests that take hours: every model of torchvision
	$(BIN)/python -m pytest -m nightly

support: $(READY)  ## docs/results/support.md: which models transform, how, and with what error; goes on where it stopped
	$(BIN)/python -m benchmarks.support

bench: $(READY)  ## overhead against plain training: resnet18 in three processes, the suite, growth, a peer, augmentations (an hour)
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.overhead --networks $(SUITE) --processes 1 --rounds 5
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.augment
	$(BIN)/python -m benchmarks.language
	$(BIN)/python -m benchmarks.host
	$(BIN)/python -m benchmarks.distributed --batch-size 64
	$(BIN)/pip install --quiet betty-ml
	$(BIN)/python -m benchmarks.peer

paper: $(READY)  ## the paper's experiments at the small budget, then docs/results/paper.md (many hours; goes on where it stopped)
	$(BIN)/python -m benchmarks.paper linear
	$(BIN)/python -m benchmarks.paper run
	$(BIN)/python -m benchmarks.paper robustness --task fmnist
	$(BIN)/python -m benchmarks.tables

figures: $(READY)  ## the figures and tables of README and docs from benchmarks/results
	$(BIN)/python -m benchmarks.ridge
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python -m benchmarks.tables

gpu:  ## ten minutes on a machine with CUDA and the dependencies installed; nothing is downloaded
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu --device $(DEVICE)

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

.venv-docs/ready: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --upgrade 'pip>=25.1'
	.venv-docs/bin/pip install --quiet --group docs
	touch $@
