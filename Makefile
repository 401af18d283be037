# `make demo` sets up and runs a first study, `make test` sets up and runs the tests; both need only Python 3.11+.
# Another Python: make demo PYTHON=python3.12        Part of the tests: make test ARGS='tests/test_study.py -x'

PYTHON ?= python3
ARGS ?=

# Nothing is compiled at the set-up; where this is set, every process would compile all of PyTorch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

# The two marks lie inside the environment, so that they go when it goes. While it is being filled it is marked
# unfinished; what carries that mark at the start was interrupted and is made anew, since nobody knows what it lacks.
READY := .venv/.set-up
UNFINISHED := .venv/.unfinished

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-gpu clean

help:
	@echo "make demo    set up, run the study 'quickstart' on a real model, write its dashboard (6 to 9 minutes)"
	@echo "make test    set up, check the code and run the tests; ARGS='...' goes to pytest and leaves the check out"
	@echo "make test-gpu  the tests of everything that computes, on this machine's GPU; skipped with the reason without one"
	@echo "make check   format, lint and types (ruff, mypy)"
	@echo "make setup   only set up: .venv with the tested versions of everything"
	@echo "make clean   remove .venv and what tools leave behind; results (mlflow.db, dashboards) stay"

setup: $(READY)

demo: $(READY)
	@.venv/bin/locft sweep quickstart
	@echo
	@echo "Dashboard:  open quickstart.html in a browser (one file, works offline)"
	@echo "MLflow:     .venv/bin/locft ui      every trial of the study, on 127.0.0.1"
	@echo "Next:       .venv/bin/locft plan layer-sweep      or with your own edits: .venv/bin/locft --help"

check: $(READY)
	@.venv/bin/ruff format --check --quiet . || { echo "not formatted: run .venv/bin/ruff format ." >&2; exit 1; }
	@.venv/bin/ruff check --quiet .
	@.venv/bin/mypy --no-error-summary

# All tests are divided among the cores, and a core that is done takes over some of another's. A part of them (ARGS) runs in
# one process, which starts sooner and can be debugged.
test: $(READY) $(if $(ARGS),,check)
ifeq ($(ARGS),)
	@.venv/bin/python -m pytest --quiet -m clock `grep -rl 'pytest.mark.clock' tests --include='test_*.py'`
	@.venv/bin/python -m pytest -m 'not clock' -n logical --maxprocesses 4 --dist worksteal
else
	@.venv/bin/python -m pytest $(ARGS)
endif

test-gpu: $(READY)
	@LOCFT_TEST_DEVICE=cuda .venv/bin/python -m pytest -m device $(or $(ARGS),-rs)

$(READY): pyproject.toml constraints.txt
	@command -v '$(PYTHON)' >/dev/null || { \
	    echo "'$(PYTHON)' is not there: install Python 3.11 or newer," \
	        "or name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "'$(PYTHON)' is `'$(PYTHON)' --version 2>&1`, Python 3.11 or newer is needed;" \
	        "name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@if test -e $(UNFINISHED); then echo "An earlier set-up was interrupted: starting it again"; fi
	@echo "Setting up .venv: about 2 GB of packages (more where torch comes with CUDA), 2 to 5 minutes ..."
	@if test -e $(UNFINISHED) || \
	    ! .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    rm -rf .venv && mkdir .venv && touch $(UNFINISHED) && '$(PYTHON)' -m venv .venv; fi
	@touch $(UNFINISHED)
	@# pip undoes what it cannot finish, unless it is killed: then the mark stays
	@.venv/bin/python -m pip install -qq --disable-pip-version-check --no-input \
	    --no-compile -c constraints.txt -e '.[test]' || { \
	    code=$$?; test $$code -gt 128 || rm -f $(UNFINISHED); exit $$code; }
	@mv $(UNFINISHED) $@
	@touch $@
	@echo "Set up."

clean:
	rm -rf .venv build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find analysis locft sweeps tests -name __pycache__ -type d -prune -exec rm -rf {} +
