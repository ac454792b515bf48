# One virtual environment, .venv, for everything. PYTHON picks the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test slow check clean

install: .venv/installed

# The tested set of versions; see constraints.txt.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/rrcm quickstart

test: install
	$(BIN)/pytest

slow: install
	$(BIN)/pytest -m slow

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy src

clean:
	rm -rf .venv build dist
