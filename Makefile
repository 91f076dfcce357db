# The workbook's verbs. Only python3 (3.11 or newer) and make are assumed.
#
#   make run        execute the notebooks into outputs/<name>/    MODEL= PARAMS= OUT= NOTEBOOKS=
#   make test       unit tests, reference vectors, notebook rules, nbval, papermill's own command line
#   make lint       ruff over code and notebooks
#   make lab        open JupyterLab with this environment's kernel                LAB_ARGS="--no-browser --port 6006"
#   make notebooks  execute the committed notebooks again, in place
#
# ENV=current uses the Python environment that is active (conda on a rented card, say) with the torch it has,
# instead of the .venv that is built here from constraints.txt.

SHELL := /bin/bash
PYTHON ?= python3
ENV ?= venv
MODEL ?=
PARAMS ?=
OUT ?=
NOTEBOOKS ?=
JOBS ?= 2
LAB_ARGS ?=
# Containers and rented machines run everything as root, which JupyterLab refuses unless told.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

STAMP := .venv/.installed
ifeq ($(ENV),current)
READY := current
PY := python
else ifeq ($(ENV),venv)
READY := $(STAMP)
PY := .venv/bin/python
else
$(error ENV=$(ENV) is unknown: leave it out (a .venv is made), or write ENV=current (the active one))
endif

# A kernelspec in the user's home must not win over this environment's own.
export JUPYTER_PREFER_ENV_PATH := 1
# The tiny model gains an eighth from a second thread, and loses tenfold where another program holds that core.
export OMP_NUM_THREADS ?= 1

.PHONY: run test lint lab notebooks current
.DEFAULT_GOAL := run

run: $(READY)
	@$(PY) -m helpers.workbook run $(if $(MODEL),--model "$(MODEL)") $(if $(PARAMS),--params "$(PARAMS)") \
	    $(if $(OUT),--out "$(OUT)") $(if $(NOTEBOOKS),--notebooks $(NOTEBOOKS))

test: $(READY)
	$(PY) -m pytest -n $(JOBS) --dist loadfile tests notebooks --nbval-lax \
	    --nbval-sanitize-with tests/nbval.cfg --nbval-cell-timeout 300

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

lab: $(READY)
	$(PY) -m jupyter lab --notebook-dir . --LabApp.default_url=/lab/tree/notebooks/00_setup.ipynb $(AS_ROOT) $(LAB_ARGS)

notebooks: $(READY)
	@$(PY) -m helpers.workbook run --in-place $(if $(NOTEBOOKS),--notebooks $(NOTEBOOKS))

# torch goes first and by itself, so that an already present or CPU-only build of this version is kept.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	    echo "make: there is no $(PYTHON) here: install Python 3.11 or newer, or name it: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1 || true), the workbook needs Python 3.11 or newer." >&2; \
	    echo "      Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "make: $(PYTHON) cannot make virtual environments (no module venv or ensurepip)." >&2; \
	    echo "      On Debian and Ubuntu: apt-get install python3-venv." >&2; \
	    echo "      Or use the active environment: make ENV=current $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv, once: a few minutes"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

# The stamp lies in the environment itself and goes with it. Its torch is held: pip must not replace a CUDA build.
current:
	@prefix=$$(python -c 'import sys; print(sys.prefix)') || { \
	    echo "make: ENV=current, but no python is active: conda activate bagel, or leave ENV out." >&2; exit 1; }; \
	stamp="$$prefix/.bagel-workbook"; \
	if [ "$$stamp" -nt pyproject.toml ]; then exit 0; fi; \
	held=$$(python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' 2>/dev/null) || { \
	    echo "make: ENV=current, but $$prefix has no torch: install the build for your card" >&2; \
	    echo "      (https://pytorch.org/get-started/locally/), or leave ENV out." >&2; exit 1; }; \
	echo "installing into $$prefix, once; $$held stays"; \
	python -m pip install --quiet --disable-pip-version-check -c <(echo "$$held") -e ".[test]" && touch "$$stamp"
