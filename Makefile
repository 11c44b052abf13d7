# Every target sets up .venv by itself. PYTHON may name another Python 3.11 to 3.13.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2
REPORTS := build/faults
SEEDS ?= 3
MINUTES ?= 10
SEED ?= 1

.PHONY: demo up down test test-long faults chaos week lint format bench clean wipe

demo: $(READY) ## run a whole trading day on a simulated exchange, in about a minute
	$(BIN)/ssmd demo

up: $(READY) ## start servers, simulated exchange and Dagster; Ctrl-C stops them
	$(BIN)/ssmd up

down: $(READY) ## stop everything that `make up` started
	$(BIN)/ssmd down

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not long"

test-long: $(READY) ## run the long tests too: every crash point, and new examples for every rule
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --hypothesis-profile=default

faults: $(READY) ## break everything that can break, and write docs/fault-matrix.md from the results
	rm -rf $(REPORTS)/rows
	-SSMD_FAULT_SEEDS=$(SEEDS) SSMD_FAULT_REPORTS=$(CURDIR)/$(REPORTS)/rows \
		$(BIN)/python -m pytest -n $(JOBS) --dist worksteal ssmd_dagster_tests/faults
	$(BIN)/python -m ssmd_dagster_tests.faults.matrix $(REPORTS) > docs/fault-matrix.md

chaos: $(READY) ## kill anything at random for MINUTES while a day runs
	$(BIN)/python -m ssmd_dagster_tests.faults.chaos --minutes $(MINUTES) --seed $(SEED) --report $(REPORTS)/chaos

week: $(READY) ## a broken week in fast time, brought back by schedules and sensors alone; about 25 minutes
	$(BIN)/python -m pytest ssmd_dagster_tests/defs/test_week.py ssmd_dagster_tests/defs/test_week_crashes.py

lint: $(READY) ## format, style, types, arrows of the house
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## put the code into form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## measure, and compare with the alternatives
	$(BIN)/python -m benchmarks

clean: ## remove what was built: virtual environment, reports, caches; recorded days stay
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find benchmarks scripts ssmd_dagster ssmd_dagster_tests -name __pycache__ -prune -exec rm -rf {} +

wipe: $(READY) ## remove .ssmd: recorded days, journal, credentials; refused while anything runs there
	@$(BIN)/python -c "from pathlib import Path; from ssmd_dagster.capture.supervisord import marked_processes; \
		exit('Something runs here: make down' if marked_processes(Path('.ssmd').absolute()) else 0)"
	rm -rf .ssmd

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)
