# make test    the environment, the build, style, types and the quick tests
# make check   the long ones: slow tests, GPU kernels compiled, sanitizers, aarch64
# make demo    search emoji pictures with the models that come along; then every kind of input
# make format  rewrite Python and C++ in the project's style
#
# torch is asked for by name, wherever pip looks. Where that is PyPI, its build for CUDA is large;
# TORCH_ARGS goes to pip as it is, so that it can name another build, index or file. JOBS processes
# share the quick tests.

PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?= torch==2.13.0
JOBS ?= 2

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

bin := $(VENV)/bin
pip := $(bin)/python -m pip --quiet --quiet --disable-pip-version-check --no-input
sources := $(wildcard csrc/*.cpp csrc/*.h csrc/*.inl)
cpp := $(sources) $(wildcard tests/native/*.cpp)
stamp := $(VENV)/.stamp

.PHONY: test check demo format clean build lint unit gpu-list slow aot sanitize aarch64 lesser-x86 test-torch

test: lint unit gpu-list

check: slow aot sanitize aarch64 lesser-x86

# One stamp a step; each is made again when what it stands on has changed.

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there: set PYTHON"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "venv failed; on Debian: apt-get install python3-venv"; exit 1; }

# Holds the arguments, and changes only when they do: another torch is installed then.
$(stamp)-torch-args: $(VENV)/bin/python FORCE
	@echo '$(TORCH_ARGS)' | cmp -s - $@ || echo '$(TORCH_ARGS)' > $@

$(stamp)-torch: $(stamp)-torch-args
	$(pip) install $(TORCH_ARGS)
	@touch $@

$(stamp)-requirements: $(stamp)-torch requirements/test.txt
	$(pip) install -r requirements/test.txt
	@touch $@

$(stamp)-build: $(stamp)-requirements pyproject.toml setup.py $(sources)
	QVLFAST_WERROR=1 $(pip) install --no-build-isolation --no-deps --editable .
	@touch $@

.PHONY: FORCE
FORCE:

build: $(stamp)-build

lint: build
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/clang-format --dry-run -Werror $(cpp)

unit: build
	$(bin)/python -m pytest -q -m "not gpu and not slow" -n $(JOBS) --dist worksteal

gpu-list: build
	@echo "Not run, for want of a GPU or of the wish to use it (pytest -m gpu):"
	@$(bin)/python -m pytest -q -m gpu --collect-only --no-header | grep '::' | sed 's/^/  /' || echo "  none"

slow: build
	$(bin)/python -m pytest -q -m "slow and not gpu"

# Every Triton kernel for every GPU that it is written for: needs none.
aot: build
	TRITON_INTERPRET=0 $(bin)/python -m benchmarks.aot --check

sanitize: build
	scripts/sanitize.sh $(abspath $(bin)/python)

aarch64: build
	scripts/aarch64.sh $(abspath $(bin)/python)

lesser-x86: build
	scripts/lesser_x86.sh $(abspath $(bin)/python)

# The quick tests with another torch, in an environment of its own:
#   make test-torch TORCH_ARGS=torch==2.14.1
test-torch:
	$(MAKE) unit VENV=.venv-torch TORCH_ARGS='$(TORCH_ARGS)'

demo: build
	$(bin)/qvlfast demo
	$(bin)/python -m benchmarks.demo

format: build
	$(bin)/ruff check --fix-only .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cpp)

clean:
	rm -rf build dist .venv .venv-torch *.egg-info qvlfast/_C.*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
