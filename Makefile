# Every target sets up .venv by itself. PYTHON may name another Python 3.11 to 3.13.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2

.PHONY: demo up down test test-long lint format bench clean

demo: $(READY) ## run a whole trading day on a simulated exchange, in about a minute
	$(BIN)/ssmd demo

up: $(READY) ## start servers, simulated exchange and Dagster; Ctrl-C stops them
	$(BIN)/ssmd up

down: $(READY) ## stop everything that `make up` started
	$(BIN)/ssmd down

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not long"

test-long: $(READY) ## run the long tests too: every crash point
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

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

clean: ## remove the virtual environment and the local state
	rm -rf $(VENV) .ssmd

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)
