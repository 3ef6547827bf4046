# Two commands: `make demo` and `make test`. Each makes .venv and installs what it needs when it is not there.
PYTHON ?= python3
BIN := .venv/bin

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

.PHONY: demo test lint clean

demo: .venv/.installed  ## every stage on a synthetic corpus, on the CPU
	$(BIN)/dst demo

test: .venv/.installed  ## all tests
	$(BIN)/pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf out data models
