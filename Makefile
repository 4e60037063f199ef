# `make demo` and `make test` do all their own set-up; each needs Python >= 3.11 and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-all check build clean browser

demo: $(VENV)/.installed
	$(BIN)/expunge demo --out expunge-demo

test: $(VENV)/.dev browser
	$(BIN)/python -m pytest

test-all: $(VENV)/.dev browser
	$(BIN)/python -m pytest -m "slow or not slow"

check: $(VENV)/.dev browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

build: $(VENV)/.dev
	$(BIN)/python -m build

# Debian's browser, to look at the page with: where it is missing and root can install it, else those tests are skipped.
browser:
	@command -v chromium > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
	  && apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium; \
	} > /dev/null 2>&1 || echo "no chromium here: tests of the page in a browser will be skipped"

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expunge needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

clean:
	rm -rf $(VENV) build dist expunge-demo
