# Needs python3 >= 3.11 and make. Another interpreter: make test PYTHON=python3.12
# (in an environment of its own). On Linux, torch without CUDA (3 GB less):
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(VERSION))
BIN := $(VENV)/bin
# A stamp's name holds the version: an upgraded python3 makes the environment anew.
CREATED := $(VENV)/created-$(VERSION)
INSTALLED := $(VENV)/installed-$(VERSION)

.PHONY: demo test test-elsewhere test-newest newest test-slow lint docs clean

demo: $(INSTALLED)
	$(BIN)/python train.py configs/icons_moe_s.py --run_dir runs/demo

# A file's tests share a process, and files begin in the order of tests/conftest.py.
PYTEST = $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)-test
	$(PYTEST)

# Tests of numbers as on other machines: fewer instructions, whose programs have a cache of their
# own, fewer cores; each with toy models of its own.
NUMERICAL := $(addprefix tests/,kernels models sparsification distillation sampling test_flow.py \
  test_flux_end_to_end.py training/test_loop.py weights/torch_files/test_torch_import.py \
  weights/torch_files/test_sparse_export.py weights/keys/test_autoencoder_keys.py)
PYTEST_NUMERICAL = $(PYTEST) $(NUMERICAL)

test-elsewhere: $(INSTALLED)-test
	@seed=0; for isa in SSE4_2 AVX2; do \
	  seed=$$((seed + 1)); echo "TOY_SEED=$$seed --xla_cpu_max_isa=$$isa"; \
	  TOY_SEED=$$seed XLA_FLAGS="$$XLA_FLAGS --xla_cpu_max_isa=$$isa" \
	    JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.jax_cache/$$isa $(PYTEST_NUMERICAL) || exit; \
	done
	@for cores in 1 2 4; do \
	  if ! command -v taskset >/dev/null || [ $$cores -ge $$(nproc) ]; then \
	    echo "$$cores cores: left out, needs taskset and more cores (make test takes all)"; continue; \
	  fi; \
	  seed=$$((2 + cores)); echo "TOY_SEED=$$seed taskset --cpu-list 0-$$((cores - 1))"; \
	  TOY_SEED=$$seed taskset --cpu-list 0-$$((cores - 1)) $(PYTEST_NUMERICAL) || exit; \
	done

# The suite with the newest of all that pyproject.toml allows: jax needs a newer Python than 3.11.
NEWEST ?= python3.12
test-newest:
	@command -v $(NEWEST) >/dev/null || { \
	  echo "no $(NEWEST): expected Python 3.12 or newer (make test-newest NEWEST=...)" >&2; exit 2; }
	$(MAKE) newest PYTHON=$(NEWEST)
	$(MAKE) test PYTHON=$(NEWEST)

newest: $(INSTALLED)-test
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	@$(BIN)/python -c 'import jax, flax; print("jax", jax.__version__, "flax", flax.__version__)'

test-slow: $(INSTALLED)-test
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

# What their makers announce about their next programs is left out: docs/decisions.md.
docs: $(INSTALLED)-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo 'open build/docs/index.html, or with search: $(BIN)/python -m http.server --directory build/docs'

$(CREATED):
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON): not found, expected Python 3.11 or newer (make PYTHON=...)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is Python $(VERSION): expected 3.11 or newer (make PYTHON=...)" >&2; exit 2; }
	@echo 'an environment is made in $(VENV): a minute or two'
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
