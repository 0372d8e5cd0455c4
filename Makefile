# Needs python3 >= 3.11 and make. Another interpreter: make test PYTHON=python3.12
# (in an environment of its own). On Linux, torch without CUDA (3 GB less):
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(VERSION))
BIN := $(VENV)/bin
# A stamp's name holds the version: an upgraded python3 makes the environment anew.
CREATED := $(VENV)/created-$(VERSION)
INSTALLED := $(VENV)/installed-$(VERSION)

.PHONY: demo test test-slow lint clean

demo: $(INSTALLED)
	$(BIN)/python train.py configs/icons_moe_s.py --run-dir runs/demo

test: $(INSTALLED)-test
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(INSTALLED)-test
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is Python $(VERSION): expected 3.11 or newer (make PYTHON=...)" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(INSTALLED): pyproject.toml $(CREATED)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(INSTALLED)-%: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .jax_cache build *.egg-info
