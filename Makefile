# Two commands for everybody: `make demo` and `make test`. Each makes its own environment where there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# `make CONSTRAINTS=constraints-lowest.txt` installs the oldest Prefect that is promised.
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
# Tests mostly wait for servers, so four at once suit two cores.
PYTEST := $(BIN)/python -m pytest --numprocesses 4 --dist worksteal
CORE := prefect_segmind/approval.py,prefect_segmind/budget.py,prefect_segmind/errors.py,prefect_segmind/fingerprint.py,prefect_segmind/manifest.py,prefect_segmind/manifest_text.py,prefect_segmind/pace.py,prefect_segmind/price.py,prefect_segmind/record.py,prefect_segmind/request.py,prefect_segmind/resolution.py,prefect_segmind/retry.py,prefect_segmind/template.py

.PHONY: demo test test-quick check clean
demo: $(VENV)/.ready
	$(BIN)/prefect-segmind demo

test: $(VENV)/.ready-dev
	$(PYTEST) --cov --cov-report=
	$(BIN)/python -m coverage report --include=$(CORE) --fail-under=100
	$(BIN)/python -m coverage report --fail-under=92 --skip-covered

# Everything but what starts a worker, builds a wheel or runs a whole command.
test-quick: $(VENV)/.ready-dev
	$(PYTEST) -m "not slow"

check: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing into $(VENV); a minute or two the first time."
	$(PIP) --editable '.[sandbox]'
	@touch $@

$(VENV)/.ready-dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing into $(VENV); a few minutes the first time."
	$(PIP) --editable '.[sandbox,dev]'
	@touch $@ $(VENV)/.ready

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage
