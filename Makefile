# Everything below works on a fresh machine with Python 3.11 or newer: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := demo
WORKERS ?= 2
READY  := $(VENV)/.ready

.PHONY: demo test lint docs clean

# The demo data set, restored; prints where the report is.
demo: $(READY)
	rm -rf $(DEMO)/bids
	$(BIN)/python -m brainprior_bids.evaluation.demo $(DEMO)/bids
	$(BIN)/brainprior $(DEMO)/bids $(DEMO)/out participant --omp-nthreads 2 -v
	@echo "Report: $(CURDIR)/$(DEMO)/out/sub-01.html"

# The whole suite, in WORKERS processes of one thread each (a file's tests stay together). Tests marked "shared" need a
# folder of real scans and are skipped where it is absent.
test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# HTML pages in docs/_build; a warning is an error.
docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "brainprior needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) docs/_build build dist *.egg-info
