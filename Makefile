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

.PHONY: demo test test-elsewhere test-slow lint clean

demo: $(INSTALLED)
	$(BIN)/python train.py configs/icons_moe_s.py --run-dir runs/demo

test: $(INSTALLED)-test
	$(BIN)/python -m pytest -n auto --dist loadfile

# Tests that compare numbers, as on other machines: less instructions, other cores, other toy models.
# Programs of other instructions have a cache of their own.
NUMERICAL := $(addprefix tests/,kernels models sparsify distill sampling test_flow.py \
  test_flux_end_to_end.py training/test_loop.py weights/test_torch_import.py \
  weights/test_sparse_export.py weights/test_autoencoder_keys.py)
ISA = XLA_FLAGS="$$XLA_FLAGS --xla_cpu_max_isa=$(1)" JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.jax_cache/$(1)
ELSEWHERE = env TOY_SEED=$(1) $(2) $(BIN)/python -m pytest -n auto --dist loadfile $(NUMERICAL)

test-elsewhere: $(INSTALLED)-test
	$(call ELSEWHERE,1,$(call ISA,SSE4_2))
	$(call ELSEWHERE,2,$(call ISA,AVX2))
	@command -v taskset >/dev/null || { echo "no taskset: other cores left out" >&2; exit 0; }; \
	for cores in 1 2 4; do \
	  [ $$cores -le $$(nproc) ] || { echo "$$cores cores: $$(nproc) are here" >&2; continue; }; \
	  set -x; $(call ELSEWHERE,$$cores,taskset --cpu-list 0-$$((cores - 1))) || exit; set +x; \
	done

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
