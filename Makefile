# `make help` lists the targets. Each sets up .venv itself when it is missing or out of date.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.up-to-date
LOCK  := requirements-dev.lock
# One worker per core; each worker is held to one thread by tests/conftest.py.
JOBS  ?= 2
DEMO_OUT ?= runs/demo

# The first of these that is Python 3.11 or later; `make PYTHON=/path/to/python` overrides it.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; \
	done)

# Nothing is compiled at installation: Python keeps what it compiles when it is first imported. A
# machine that tells it not to would compile torch in each of the suite's thousand processes.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup test test-all test-oldest lint types unit format demo docs tutorial lock release-check clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 24

setup: $(STAMP) ## set up .venv: the locked packages and this checkout, editable

# .installing outlives an interrupted installation, which may leave packages half unpacked that
# pip would take for installed: the next run then starts from an empty environment. The stamp
# comes last, so that it only ever stands for a complete environment.
$(STAMP): $(LOCK) pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: Python 3.11 or later is needed, found '$(PYTHON)'; install one and name it: make PYTHON=/path/to/python" >&2; \
		exit 1; }
	@test ! -e $(VENV)/.installing || rm -rf $(VENV)
	@echo "setting up $(VENV) (a few minutes the first time)"
	@# Some systems package Python without ensurepip: then the pip of $(PYTHON) does its work.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || \
		$(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 || \
		{ $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		  $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@touch $(VENV)/.installing
	@# Of 20,000 files few are ever imported, and these Python compiles when they are.
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -r $(LOCK)
	@# hatchling and editables are locked too, so the build needs no environment of its own.
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@rm $(VENV)/.installing
	@touch $@

test: lint types unit ## everything a change has to pass

test-all: ## make test with every case of the products that it samples (tests/helpers/sampling.py)
	MUONKIT_TEST_ALL=1 $(MAKE) test

lint: $(STAMP) ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy --strict on the package
	$(BIN)/mypy

unit: $(STAMP) ## pytest, warnings as errors
	$(BIN)/pytest -n $(JOBS) --dist worksteal

# The oldest torch that pyproject.toml declares, by the newest of its bug fixes; gigabytes, so not
# part of `make test`. numpy below 2.4: the interpreters of older Tritons fail with later ones. Not
# test_compiled_step: torch 2.9 rounds a compiled step otherwise (parameters differ from an eager
# step's by up to 3e-5), and compiles a scheduled number six times.
OLDEST := .venv-oldest
OLDEST_TORCH = torch==$(shell sed -n 's/^dependencies = \["torch>=\([0-9.]*\)"\]$$/\1/p' pyproject.toml).*
OLDEST_TESTS := $(addprefix tests/,convert distributed monitor newton_schulz optim qk_clip routing testing \
	package/test_imports.py package/test_torch_names.py) \
	$(addprefix --ignore=tests/,$(addsuffix .py,monitor/test_trackers optim/test_compiled_step optim/test_event_fuzz \
	optim/test_gpu optim/test_magnitudes optim/test_modes optim/test_options routing/test_architectures \
	routing/test_reviewed))

$(OLDEST)/.up-to-date: pyproject.toml
	rm -rf $(OLDEST)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check '$(OLDEST_TORCH)' 'numpy<2.4' \
		hatchling editables expecttest hypothesis mypy pytest pytest-timeout pytest-xdist
	$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

test-oldest: $(OLDEST)/.up-to-date ## core and distributed tests and types, on the oldest torch that is declared
	$(OLDEST)/bin/python -c 'import torch; print("torch", torch.__version__)'
	$(OLDEST)/bin/mypy --cache-dir .mypy_cache/oldest --ignore-missing-imports --allow-subclassing-any --no-warn-unused-ignores \
		--exclude '/lab/|_cli' src
	$(OLDEST)/bin/pytest -n $(JOBS) --dist worksteal $(OLDEST_TESTS)

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP) ## Muon against AdamW on real text, with a picture (under 4 minutes)
	$(BIN)/muonkit compare gpt --out $(DEMO_OUT)

docs: $(STAMP) ## the documentation site, into site/; broken links and stale notebooks are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

tutorial: $(STAMP) ## execute the tutorial's notebooks whose code changed (minutes), into docs/tutorial/*.ipynb
	$(BIN)/python docs/notebooks.py

# The lock is what the extras of pyproject.toml resolve to today in an empty environment. A local
# version such as torch's +cpu is cut off: which build fits is the installing machine's choice.
lock: ## renew requirements-dev.lock from pyproject.toml
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet --disable-pip-version-check 'torch==2.13.0' '.[dev]'
	{ echo '# What development runs on, pinned. Written by `make lock`; do not edit.'; \
	  $(VENV)-lock/bin/pip --disable-pip-version-check freeze --all --exclude muonkit --exclude pip | sed 's/+[a-z0-9.]*$$//; s/^triton==.*/&; platform_system == "Linux"/'; } > $(LOCK).new
	mv $(LOCK).new $(LOCK)
	rm -rf $(VENV)-lock

# What a release is made with: twine brings twenty packages that nothing else needs.
RELEASE := .venv-release

$(RELEASE)/.up-to-date: Makefile
	rm -rf $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install -qq --disable-pip-version-check 'build>=1.2' 'hatchling>=1.27' 'twine>=6'
	touch $@

release-check: $(STAMP) $(RELEASE)/.up-to-date ## build and check what a release uploads, into dist/ (TAG=v0.1.0: for that tag)
	$(BIN)/python release/check.py --tools $(RELEASE)/bin/python $(if $(TAG),--tag $(TAG))

clean: ## remove .venv, caches and builds (not runs/)
	rm -rf $(VENV) $(VENV)-lock $(OLDEST) $(RELEASE) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
