# demo: install into .venv and run the demonstration.   test: everything that CI checks.
# bench: the benchmark table of this machine.           lint, format: style of Python and C++.

PYTHON ?= python3
VENV   ?= .venv
# Asked for first and by itself: pip then takes a local build of this version where there is one, for example
# a CPU-only build, and leaves it alone when it installs what depends on torch.
TORCH  ?= torch==2.13.0

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check
BUILD  = build/$(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)')
JOBS  ?= $(shell nproc 2>/dev/null || echo 2)
CXX_FILES = $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.hpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
# Without a GPU, tests run the CUDA kernels' host build; `gpu-compile` compiles them for GPUs.
CUDA  ?= $(if $(shell nvidia-smi -L 2>/dev/null),AUTO,OFF)

# Builds without isolation and ctest find cmake and ninja of the environment first.
export PATH := $(abspath $(BIN)):$(PATH)

# Most modules of the packages are never imported: pip compiles none, and Python keeps what it compiles.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test develop native packages tools lint format cpp-test gpu-compile bench clean

demo: $(VENV)/with-torch
	TVFAST_CUDA=OFF $(PIP) install '.[demo]'
	$(BIN)/tvfast demo

# pytest runs last, so that its summary is the last line. Its workers share the cores: torch's threads must not wait
# for each other by spinning.
test: develop
	$(MAKE) lint
	$(MAKE) cpp-test
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# An editable install: warnings are errors, and what only tests use is in: the emulated instruction set, and the CUDA
# kernels' host build. The tools keep their place, so that a second run compiles only what changed.
develop: native packages

# The modules need no package but the tools: with `make -j2` they are compiled while pip installs the rest.
native: tools
	MAKEFLAGS= TVFAST_CUDA=$(CUDA) \
	  CMAKE_ARGS='-DTVFAST_WERROR=ON -DTVFAST_EMULATED_ISA=ON -DTVFAST_SIMT=ON' \
	  $(BIN)/python setup.py -q build_ext --inplace

packages: tools
	$(MAKE) $(VENV)/with-torch
	TVFAST_NATIVE=OFF $(PIP) install -q --no-compile --no-build-isolation -e '.[dev,demo]'

tools: | $(BIN)/python
	$(PIP) install -q 'setuptools>=77' wheel 'pybind11>=2.13' ninja 'cmake>=3.24'

$(VENV)/with-torch: | $(BIN)/python
	$(PIP) install --no-compile '$(TORCH)'
	touch $@

# Where pip cannot be put into it, as without Debian's python3-venv, the interpreter is there nonetheless.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; }

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# In the build folder of the editable install, so that the library is compiled once for both.
cpp-test:
	cmake -B $(BUILD) -DTVFAST_TESTS=ON
	cmake --build $(BUILD) -j $(JOBS)
	ctest --test-dir $(BUILD) --no-tests=error --output-on-failure -j $(JOBS)

# CUDA and Triton kernels must compile for sm_80 and sm_90 on machines without a GPU too; of the CUDA module one small
# file must for every architecture of releases.
gpu-compile: develop
	cmake --preset cuda -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	cmake --build --preset cuda -j $(JOBS)
	$(BIN)/python -m tests.cuda.gates build/cuda/_C_cuda*.so
	cmake --preset cuda-release -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	cmake --build build/cuda-release --target CMakeFiles/_C_cuda.dir/csrc/cuda/runtime.cu.o
	$(BIN)/python -m tvfast.kernels.compile_ahead

# BENCH="--op combine --threads 1" chooses; TVFAST_MERGEKIT_PYTHON adds the rows of mergekit.
bench: develop
	$(BIN)/python bench/run.py $(BENCH)

clean:
	rm -rf build dist *.egg-info tvfast/*.so
