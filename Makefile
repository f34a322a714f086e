# make demo: one prompt, answered on this machine.   make test: everything the tests need, then the tests.
# Both make their own .venv here and need only Python 3.11 or newer (PYTHON=... names another one).
PYTHON ?= python3
VENV := .venv
export PROMPT ?= Why is the sky blue?

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input

.PHONY: demo test lint types clean

demo: $(VENV)/ready
	@$(BIN)/edgellama pull
	@printf '\n>>> %s\n' "$$PROMPT"
	@$(BIN)/edgellama run smollm2-135m-instruct --temperature 0 --max-tokens 100 "$$PROMPT"

test: $(VENV)/ready-dev
	@$(BIN)/edgellama pull
	$(BIN)/python -m pytest -W error

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready-dev # checks what ships, as an installed package
	rm -rf build
	$(PIP) install --no-deps --target build/typed .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist

# A stamp appears only after everything before it went well, so an interrupted set-up starts again.
$(VENV)/made:
	@echo "Setting up $(VENV) with $$($(PYTHON) --version)..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgellama needs Python 3.11 or newer: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/ready: $(VENV)/made pyproject.toml
	@echo "Installing edgellama (the first time, this takes a minute)..."
	@$(PIP) install -e .
	@touch $@

$(VENV)/ready-dev: $(VENV)/made pyproject.toml
	@echo "Installing edgellama and what its tests need (the first time, this takes a minute)..."
	@$(PIP) install -e ".[dev]"
	@touch $@ $(VENV)/ready
