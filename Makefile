# make install, then any of the others; CONTRIBUTING.md says when.
PYTHON ?= python

.PHONY: install test test-all lint notebooks benchmarks site

install:
	$(PYTHON) -m pip install -e ".[lab,test,site,dev]"

test:
	$(PYTHON) -m pytest

test-all: test
	$(PYTHON) -m pytest -m "slow or browser or processes or kills"

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

notebooks:
	$(PYTHON) tools/run.py

benchmarks:
	$(PYTHON) benchmarks/students.py
	$(PYTHON) benchmarks/race.py
	$(PYTHON) benchmarks/second_run.py

site:
	$(PYTHON) -m sphinx -b html --fail-on-warning --keep-going -c docs -d build/doctrees . build/site
