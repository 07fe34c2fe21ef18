# Every target sets up what it needs: the environment in .venv is made on first use, and again whenever
# pyproject.toml or constraints.txt change. Another Python: make test PYTHON=python3.13

PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
SWEEP_ARGS ?= --jobs 2

VENV := .venv
INSTALLED := $(VENV)/.installed
OLDEST := .oldest/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test oldest check bench sweep format clean

# Nothing below needs a model hub, and nothing may wait for one.
demo test oldest bench sweep: export HF_HUB_OFFLINE = 1

# Tests run one per core, and tiny models compute no faster with more threads.
test oldest: export OMP_NUM_THREADS = 1

help: ## say what can be made
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

demo: $(INSTALLED) ## prune a real small model end to end, into runs/demo
	@$(VENV)/bin/blockpruner demo --run runs/demo

test: $(INSTALLED) ## run the tests; more options for pytest in PYTEST_ARGS
	@$(VENV)/bin/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

oldest: $(OLDEST) ## run forty architectures with the oldest transformers supported
	@PYTHONPATH=$(dir $(OLDEST)) $(VENV)/bin/python -m pytest -q --numprocesses auto --maxprocesses 8 $(PYTEST_ARGS) tests/test_versions.py

check: $(INSTALLED) ## formatting, lint and types
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/pyright

bench: $(INSTALLED) ## what a search costs beside the published loop; options in BENCH_ARGS
	@$(VENV)/bin/python benchmarks/search_cost.py $(BENCH_ARGS)

sweep: $(INSTALLED) ## every architecture of transformers, tiny: what works, what is refused; options in SWEEP_ARGS
	@$(VENV)/bin/python benchmarks/architecture_sweep.py $(SWEEP_ARGS)

format: $(INSTALLED) ## put the code in form
	@$(VENV)/bin/ruff format
	@$(VENV)/bin/ruff check --fix

clean: ## remove .venv, caches and build products; runs/ stays
	rm -rf $(VENV) $(dir $(OLDEST)) build dist .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "blockpruner needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up $(VENV): about 2 GB, a few minutes the first time" >&2
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[data,demo,dev,multi-gpu,plots,ray,tasks,train]'
	@touch $@

$(OLDEST): constraints-oldest.txt $(INSTALLED)
	@$(VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --upgrade \
		--no-deps --target $(dir $(OLDEST)) --requirement constraints-oldest.txt
	@touch $@
