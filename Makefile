# Everything runs in .venv, made with PYTHON (3.11 to 3.13) and the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile
STEP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: install demo test test-all lint types wheel dist docs docs-serve bench clean

install: .venv/experiments

demo: .venv/experiments
	$(BIN)/python -m experiments.toy2d

# Most tests compile without XLA's optimizations, those of numbers as users do.
test: .venv/test
	$(PYTEST)
	XLA_FLAGS= $(PYTEST) -m "optimized and not slow"

test-all: .venv/test
	$(PYTEST) -m "not optimized"
	XLA_FLAGS= $(PYTEST) -m optimized

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/pyright

# Build the wheel, and import it where there is nothing but what it depends on.
wheel: .venv/bin/python
	rm -rf build/wheel build/clean
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip --disable-pip-version-check install --quiet \
		--constraint constraints.txt build/wheel/*.whl
	cd build/clean && bin/python -c "import jcnf; print(jcnf.__version__, jcnf.__file__)"
	cd build/clean && ! bin/python -c "import experiments" 2> /dev/null

# Build the source archive and the wheel, and check that their metadata and README render.
dist: .venv/release
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

# The variable silences what the theme says about MkDocs at every start; see docs/site.md.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

bench: .venv/experiments
	$(BIN)/python -m experiments.benchmark

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

# A stamp for each set of extras, renewed when the pins change.
.venv/experiments .venv/test .venv/dev .venv/docs .venv/release: .venv/%: .venv/bin/python pyproject.toml constraints.txt
	$(STEP) --editable '.[$*]'
	@touch $@
