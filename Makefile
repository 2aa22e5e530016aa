# Everything starts from nothing: each target makes the environment it needs, under constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CLIPS ?= ../shared/clips

.PHONY: demo test lint claims bench docs format clean

demo: $(READY)  ## set up, then slow down and compress real clips and show them in demo/index.html
	$(BIN)/frameloom demo -o demo

test: $(READY) lint  ## everything that CI runs
	$(BIN)/python -m pytest -n 2 tests

lint: $(READY)
	$(BIN)/ruff check -q --output-format concise src tests benchmarks docs
	$(BIN)/ruff format -q --check src tests benchmarks docs
	$(BIN)/lint-imports --no-cache
	$(BIN)/python docs/build.py --check

format: $(READY)
	$(BIN)/ruff check -q --fix src tests benchmarks docs
	$(BIN)/ruff format -q src tests benchmarks docs

claims: $(READY)  ## re-measure every claim (one that does not hold is no failure here) and keep the figures for the cards and the docs
	for id in $$($(BIN)/python docs/build.py --claims); do $(BIN)/frameloom claim $$id --save || test $$? -eq 1; done

bench: $(READY)  ## side-by-side measurements; CLIPS=DIR adds real footage
	$(BIN)/python benchmarks/all.py $(CLIPS)

docs: $(READY)  ## the pages under docs/ and the README's tables, from the cards
	$(BIN)/python docs/build.py

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .ruff_cache
