# `make run` and `make test` set up the environment first; `make env` does only that.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.complete
export PATH := $(abspath $(VENV)/bin):$(PATH)

.PHONY: run test env lint lock docs

run: env
	@echo "The default experiment takes about ten minutes on two cores; its first results come within five."
	snakemake --cores all

# One process per core, each with a test file, the longest files first. Torch's own threads would slow them down.
test: env lint
	OMP_NUM_THREADS=1 python -m pytest -n logical --dist loadfile --no-loadscope-reorder

lint: env
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow
	snakemake --lint
	lint-imports
	deptry .

# The documentation as a site: open build/docs/index.html. Broken links and references fail it.
docs: env
	NO_MKDOCS_2_WARNING=1 mkdocs build

env: $(STAMP)

# Renew the pins from pyproject.toml: the packages of a fresh environment, for pip and for conda.
lock:
	$(PYTHON) -m venv $(VENV).lock
	$(VENV).lock/bin/python -m pip install --quiet torch==2.13.0
	$(VENV).lock/bin/python -m pip install --quiet -e '.[pipeline,test,docs]'
	$(VENV).lock/bin/python envs/lock.py
	rm -r $(VENV).lock

# The stamp is written last, so an interrupted set-up starts again.
$(STAMP): envs/requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hfprune needs Python 3.11 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off -r envs/requirements.txt
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -e .
	touch $(STAMP)
