# Every target works from a fresh clone: it makes .venv and installs the pinned dependencies first, once.
#   PYTHON=python3.12 make test     another Python (3.11 or later)
#   TORCH_INDEX=URL make demo       torch from another package index, e.g. a CPU build
#   ARGS='-k config -x' make test   more arguments for the command that the target runs

PYTHON ?=
TORCH_INDEX ?=
JOBS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n $(JOBS)
# Changes with what is to be installed, with the Python asked for, and with the folder, since a moved .venv does not run.
KEY := $(shell { cat pyproject.toml constraints.txt; pwd; echo "$(PYTHON)"; } | cksum | tr -dc 0-9)
RUN := .venv/.run-$(KEY)
DEV := .venv/.dev-$(KEY)
REAL := .venv/.real-$(KEY)

FAST := not slow and not multi and not gpu and not soak
REST := (slow or multi) and not gpu and not soak

.PHONY: help venv demo real models keys test test-rest test-all test-gpu soak lint bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' Makefile | while read -r target what; do printf 'make %-12s %s\n' "$$target" "$$what"; done

venv: $(DEV) ## make .venv with all that tests and lint need

demo: $(RUN) ## train a tiny model and let it answer questions
	$(BIN)/neva demo $(ARGS)

real: $(REAL) ## a vision-language model of real pre-trained parts: half an hour
	$(BIN)/python -m examples.real $(ARGS)

models: $(DEV) ## write the table of docs/models.md from what it runs
	$(BIN)/python -m docs.make_models

keys: $(DEV) ## write docs/keys.md and the tables of docs/gpus.md from the code
	$(BIN)/python -m docs.make_keys
	$(BIN)/python -m docs.make_gpus

test: $(DEV) ## the fast tests
	$(PYTEST) -m "$(FAST)" $(ARGS)

test-rest: $(DEV) ## the slow and multi-process tests
	$(PYTEST) -m "$(REST)" $(ARGS)

test-all: $(DEV) ## both
	$(PYTEST) -m "not gpu and not soak" $(ARGS)

test-gpu: $(DEV) ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

soak: $(DEV) ## long matrices, hundreds of kills: hours
	$(BIN)/python -m pytest -m soak --timeout 0 $(ARGS)

lint: $(DEV) ## style, types and the house rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_house.py

bench: $(DEV) ## the measurements in bench/
	set -e; for file in bench/*.py; do echo "== $$file"; $(BIN)/python "$$file" $(ARGS); done

clean: ## remove .venv and what builds and tests left
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last: an install that broke off is taken up again by the next run.
define install
	@PYTHON="$(PYTHON)" .ci/venv
	$(if $(TORCH_INDEX),$(PIP) install --no-deps --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' constraints.txt)")
	$(PIP) install -e '$(1)' -c constraints.txt
	@touch $(2)
endef

$(RUN): ; $(call install,.,$(RUN))
$(DEV): ; $(call install,.[dev],$(RUN) $(DEV))
$(REAL): ; $(call install,.[real],$(RUN) $(REAL))
