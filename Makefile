# Set-up and checks. Everything lives in .venv/; nothing is installed outside it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LIMIT ?= 80
OUT ?= runs

.PHONY: demo test lint types unit faults clean help

help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(VENV)/.installed ## Score the standard library's source with the bundled model (LIMIT=80 files)
	$(BIN)/python infra/demo/demo.py --limit $(LIMIT) --out $(OUT)

test: lint types unit ## Lint, types and tests

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.tested
	$(BIN)/python infra/check_types.py

unit: $(VENV)/.tested
	$(BIN)/python -m pytest -n 2

faults: $(VENV)/.tested ## The long form of what goes wrong: an hour or more
	LOGITMILL_LONG=1 $(BIN)/python -m pytest -rP tests/flows/test_workers.py \
		tests/flows/test_worker_faults.py tests/flows/test_kill.py \
		tests/flows/test_storage.py tests/flows/test_storage_faults.py \
		tests/flows/test_catalog.py tests/infra/test_scheduled.py

clean: ## Remove what the targets made
	rm -rf $(VENV) build *.egg-info

# torch goes first and by its exact version: a range would bring several GB of CUDA packages.
$(VENV)/.installed: pyproject.toml infra/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "torch==2.13.0"
	$(BIN)/python -m pip install -q -c infra/constraints.txt -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c infra/constraints.txt -e ".[test]"
	touch $@
