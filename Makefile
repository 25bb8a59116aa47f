# Everything happens in .venv, from locked, hashed requirements (deploy/lock). `make up` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
ARGS   ?=
NODE   := tests/conformance/guides tests/conformance/clients

.PHONY: up test faults simulation check lint types imports bench sim lock format clean

up: $(VENV)/.run
	@$(BIN)/weftline up $(ARGS)

test: $(VENV)/.dev $(NODE:=/node_modules)
	@$(BIN)/pytest -m "(not faults or quick) and not by_hand" --cov --cov-report=term:skip-covered $(ARGS)

# All fault tests, about a quarter of an hour; as root those with bad networks too.
faults: $(VENV)/.dev
	@$(BIN)/pytest -m faults $(ARGS)

simulation: $(VENV)/.dev
	@$(BIN)/python -m tests.simulation $(or $(ARGS),--requests 1000000)

check: lint types imports

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	$(BIN)/python -m bench $(ARGS)

# The schedulers compared in a simulated fleet, some minutes; ARGS=--quick for a first look. Draws docs/sim-*.svg.
sim: $(VENV)/.dev
	@$(BIN)/python -m bench.sim.compare $(ARGS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "weftline needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make up PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "Could not create $(VENV). On Debian or Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }

$(VENV)/.run: deploy/lock/run.lock pyproject.toml clients/python/pyproject.toml | $(VENV)/bin/python
	@echo "Installing weftline into $(VENV) (first time: about half a minute)"
	@$(PIP) install --quiet --require-hashes -r deploy/lock/run.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation -e clients/python -e .
	@touch $@

$(VENV)/.dev: deploy/lock/dev.lock deploy/lock/engine.lock $(VENV)/.run
	@echo "Installing what the tests need"
	@$(PIP) install --quiet --require-hashes -r deploy/lock/dev.lock
	@$(PIP) install --quiet --require-hashes --no-deps -r deploy/lock/engine.lock
	@touch $@

# The clients for Node.js run as they are pinned; without npm their tests say why they are skipped.
$(NODE:=/node_modules): %/node_modules: %/package-lock.json
	@if command -v npm >/dev/null; then npm ci --silent --no-audit --no-fund --prefix $* && touch $@; fi

# Re-resolve the locks. Needs uv; no index address is written down.
UV_COMPILE = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header --no-emit-package weftline-client
lock:
	$(UV_COMPILE) pyproject.toml deploy/lock/build.in -o deploy/lock/run.lock
	$(UV_COMPILE) pyproject.toml deploy/lock/build.in --group dev -o deploy/lock/dev.lock
	$(UV_COMPILE) --no-deps deploy/lock/engine.in -o deploy/lock/engine.lock

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
