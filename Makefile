# Two commands for everybody: `make demo` and `make test`. Each makes its own environment where there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# `make CONSTRAINTS=constraints-lowest.txt` installs the oldest Prefect that is promised.
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
# Tests mostly wait for servers, so four at once suit two cores.
PYTEST := $(BIN)/python -m pytest --numprocesses 4 --dist worksteal --durations 10
# What `make test-quick` runs; CI runs the same tests and those with a server once more on the second Python.
QUICK ?= not slow and not many
QUICK_TESTS ?= tests/unit tests/faults prefect_segmind
# Where `make bench` writes its table.
BENCH ?= bench.md
CORE := prefect_segmind/api/history.py,prefect_segmind/api/origin.py,prefect_segmind/api/picture.py,prefect_segmind/api/request.py,prefect_segmind/api/resolutions.py,prefect_segmind/api/submission.py,prefect_segmind/archive/record.py,prefect_segmind/batch/approval.py,prefect_segmind/errors.py,prefect_segmind/jobs/address.py,prefect_segmind/jobs/fingerprint.py,prefect_segmind/jobs/job.py,prefect_segmind/limits/account.py,prefect_segmind/limits/ledger.py,prefect_segmind/limits/permits.py,prefect_segmind/limits/rate_limiter.py,prefect_segmind/limits/retry.py,prefect_segmind/manifest/expansion.py,prefect_segmind/manifest/formats.py,prefect_segmind/manifest/model.py,prefect_segmind/manifest/schema.py,prefect_segmind/manifest/template_limits.py,prefect_segmind/manifest/templates.py,prefect_segmind/money.py,prefect_segmind/redaction.py,prefect_segmind/text.py

# The tests start a hundred processes; where this is set, each of them compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-quick test-faults check bench bench-quick clean
demo: $(VENV)/.ready
	$(BIN)/prefect-segmind demo

test: $(VENV)/.ready-dev
	$(PYTEST) --cov --cov-report=
	$(BIN)/python -m coverage report --include=$(CORE) --fail-under=100
	$(BIN)/python -m coverage report --fail-under=92 --skip-covered

# A minute or two: no Prefect server, and none of the tests that try thousands of cases.
test-quick: $(VENV)/.ready-dev
	$(PYTEST) -m "$(QUICK)" $(QUICK_TESTS)

# Every point of failure of a picture's walk, and its kin, instead of the sample that `make test` has: minutes, no server.
test-faults: $(VENV)/.ready-dev
	FAULTS=all $(PYTEST) tests/faults tests/unit/test_hostile_peers.py

check: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

# A batch beside other ways to make it, as a table; up to an hour, on a machine that does nothing else.
bench: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks.bench --output $(BENCH)

# Two small batches, under three minutes.
bench-quick: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks.bench --quick --output $(BENCH)

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
