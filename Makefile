# A fresh machine needs Python 3.11 (or later) and a C++ compiler; everything else is set up here. With nvcc on the PATH
# the TensorRT plugin is built too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# TensorRT's headers, to compile the plugin with: a package that carries a copy of them. Nothing of it is installed.
HEADERS := $(CURDIR)/build/headers

# Two processes of one thread each: most of the tests trace and load, which one thread does.
FAST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

.PHONY: install demo test test-fast check bench figures clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard plugins/*.cu plugins/*.cuh plugins/*.cpp plugins/*.h)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lfx needs Python 3.11 or later; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and pinned: an open range would pull a build with gigabytes of CUDA libraries.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-deps --target $(HEADERS) --upgrade --constraint constraints.txt kernel-lens
	CMAKE_ARGS="$(CMAKE_ARGS) -DTensorRT_INCLUDE_DIR=$(HEADERS)/kernel_lens/include/tensorrt" \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[export,cpu,openvino,rtx,parquet,report,metrics,verify,test]'
	touch $@

demo: install  ## Export, run a real document, check parity, compare speed with PyTorch's.
	$(BIN)/python scripts/demo.py

test: install  ## Everything, the full-size shape included.
	$(FAST)
	$(BIN)/python -m pytest -m slow

test-fast: install  ## Without the full-size shape.
	$(FAST)

check: install  ## Lint, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## All CPU benchmarks, more than an hour; writes docs/records and the tables made from it.
	$(BIN)/python scripts/bench_cpu.py
	$(BIN)/python scripts/bench_backends.py
	$(BIN)/python scripts/bench_runtime.py
	$(BIN)/python scripts/peers.py
	$(BIN)/python scripts/tables.py

figures: install  ## Draw docs/figures from the running code.
	$(BIN)/python scripts/figures.py

clean:
	rm -rf build dist $(VENV)
