# A fresh machine needs Python 3.11 or later, make, and a package index. Everything else is set up here.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet

.PHONY: help run test check bench bench-quick chaos model clean

help: ## Say what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: $(VENV)/.run ## Set everything up and serve, with embedded servers unless URLs are set
	@exec $(VENV)/bin/chat-sessions serve

# A process for each core, each with servers of its own. A file's tests stay together, for what they share, and in
# their order: sorted by how many tests they have, the files with few long ones would come last.
test: $(VENV)/.dev ## Set everything up and run all tests, on real servers: PYTEST="-k word -n 0"
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST)

check: $(VENV)/.dev ## Format, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench-quick: $(VENV)/.bench ## Measure the goals of speed against other stores, in three minutes: BENCH="--report DIR"
	$(VENV)/bin/python benchmarks/quick.py --json build/bench-quick.json $(BENCH)

bench: $(VENV)/.bench ## Measure everything, and write docs/benchmarks/: for what is published BENCH=--long
	@status=0; \
	$(VENV)/bin/python benchmarks/start.py || status=1; \
	$(VENV)/bin/python benchmarks/everything.py $(BENCH) || status=1; \
	exit $$status

chaos: $(VENV)/.dev ## Break real processes under load: DURATION=seconds SEED=n, more in CHAOS="--profile flips"
	$(VENV)/bin/python -m tests.failure.chaos --duration $(or $(DURATION),60) --seed $(or $(SEED),1) $(CHAOS)

model: $(VENV)/.dev ## Check the coherence protocol on random schedules: SCHEDULES=n SEED=n, more in MODEL="--mutants"
	$(VENV)/bin/python -m tests.failure.model --schedules $(or $(SCHEDULES),10000) --seed $(or $(SEED),1) $(MODEL)

clean: ## Remove what was set up; data in .data stays
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11: install a newer one and run make PYTHON=python3.x" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "error: $(PYTHON) -m venv failed: on Debian and Ubuntu install python3-venv" >&2; exit 1; }

# From the lock files with hashes; then this project itself, with nothing resolved anew.
$(VENV)/.run: $(VENV)/bin/python requirements/embedded.txt pyproject.toml
	@echo "setting up $(VENV) ..."
	@$(PIP) --require-hashes -r requirements/embedded.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python requirements/dev.txt pyproject.toml
	@echo "setting up $(VENV) for development ..."
	@$(PIP) --require-hashes -r requirements/dev.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@ $(VENV)/.run

$(VENV)/.bench: $(VENV)/.dev requirements/bench.txt
	@echo "setting up $(VENV) for the benchmarks ..."
	@$(PIP) --require-hashes -r requirements/bench.txt
	@touch $@
