# Two commands for a newcomer, both from a fresh clone with nothing but python3 and make:
#   make quickstart    make test
# They build their own environment in $(VENV); a stamp file there makes the second call quick.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# To pass on arguments: make quickstart ARGS="--seed 1", make test PYTEST_ARGS="-k metrics"
ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS)
TORCH := $(or $(shell grep -E '^torch==' $(CONSTRAINTS)),torch)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

##@ Start here

.PHONY: quickstart
quickstart: $(VENV)/.plot-installed $(if $(filter audio video,$(ARGS)),$(VENV)/.media-installed) ## set up, pre-train on a source, transfer to a target, compare, recommend
	$(BIN)/python examples/quickstart.py $(ARGS)

.PHONY: test
test: $(VENV)/.test-installed ## set up and run the tests, without the slow ones
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 $(PYTEST_ARGS)

##@ For contributors

.PHONY: lint
lint: $(VENV)/.dev-installed ## check style (ruff), types (mypy) and spelling (typos)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/typos

.PHONY: docs
docs: $(VENV)/.docs-installed ## build the pages as a site in build/site; a warning is an error
	$(BIN)/python docs/build.py

.PHONY: pages
pages: $(VENV)/.test-installed ## fill the tables and draw the plots of the pages from the tables of results
	$(BIN)/python benchmarks/page.py

.PHONY: format
format: $(VENV)/.dev-installed ## let ruff correct the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: slow-test
slow-test: $(VENV)/.test-installed ## run the slow tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

.PHONY: coverage
coverage: $(VENV)/.test-installed ## run the tests and show the lines that no test reaches
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --cov --cov-report=term $(PYTEST_ARGS)

.PHONY: common-tests
common-tests: $(VENV)/.test-installed ## download the common model tests of transformers and run them on our models
	$(BIN)/python tests/common/fetch.py
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow tests/common $(PYTEST_ARGS)

.PHONY: release
release: ## build wheel and sdist into dist/, and try the wheel in an empty environment
	PYTHON=$(PYTHON) bash .ci/release

.PHONY: cards
cards: $(VENV)/.test-installed ## render the model cards again from the tables of results
	$(BIN)/transrec card model_cards/*/

.PHONY: install
install: $(VENV)/.dev-installed ## set up the environment with everything for development

.PHONY: clean
clean: ## remove the environment, caches and built files
	rm -rf $(VENV) build dist .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help
help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} \
		/^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo

# torch is installed first and alone, so that its build is fixed before packages that depend on it are resolved.
$(VENV)/.torch-installed: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	@touch $@

$(VENV)/.%-installed: $(VENV)/.torch-installed pyproject.toml
	$(INSTALL) --editable '.[$*]'
	@touch $@
