# make demo     train, evaluate and draw an open-vocabulary detector on OV-Shapes
# make test     run the tests, a process for each core
# make lint     check style, format and types
# make install  make .venv, which the three above do too
# make doctor   say what of the environment is missing or mismatched
# make versions run tests with the oldest and the newest torch that setup.py allows, each in an environment (.venv-torch)
# make clean    remove what the commands above have built, .venv included
#
# demo, test and lint first create .venv (6 GB) and install what is missing; the next time there is nothing to install.
# Another Python: make demo PYTHON=python3.12. An environment of your own: make demo VENV=/path/of/it, whose
# versions are kept where setup.py allows them.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

# The stamp's name changes with whatever decides what is installed, so that a change installs again.
INPUTS := setup.py pyproject.toml constraints.txt ovdet2/programs/install_detectron2.py
STAMP := $(VENV)/.ovdet2-$(shell (pwd; cat $(INPUTS)) | sha256sum | cut -c1-16)
CONSTRAINTS := $(if $(filter .venv,$(VENV)),-c constraints.txt)
PIP := $(PY) -m pip --disable-pip-version-check

.PHONY: demo test lint install doctor versions clean

demo: $(STAMP)
	@$(PY) -m ovdet2 doctor --quiet
	$(PY) -m ovdet2 demo

test: $(STAMP)
	@$(PY) -m ovdet2 doctor
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n auto --dist loadfile

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tools/check_types.py

install: $(STAMP)

doctor:
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m ovdet2 doctor

versions:
	$(PYTHON) tools/torch_versions.py $(TESTS)

clean:
	rm -rf build dist .pytest_cache .hypothesis .ruff_cache ovdet2.egg-info
	$(if $(filter .venv,$(VENV)),rm -rf .venv .venv-torch)

# Every step does nothing where its work is done, so an interrupted installation goes on where it stopped.
# Detectron2 comes last because pip needs torch to read the description of its source.
$(STAMP): $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make PYTHON=python3.11 ..."; exit 4; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	$(PIP) install --quiet $(CONSTRAINTS) "setuptools>=70.1"
	$(PIP) install $(CONSTRAINTS) --no-build-isolation --editable ".[test,dev]"
	# A reference for tests. It asks for opencv-python, whose files would replace those of opencv-python-headless.
	$(PIP) install $(CONSTRAINTS) --no-deps lvis
	$(PY) -m ovdet2 doctor --install-detectron2
	@rm -f $(VENV)/.ovdet2-* && touch $@
