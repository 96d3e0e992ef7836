# A fresh machine needs Python 3.11 (or later) and a C++ compiler; everything else is set up here. With nvcc on the PATH
# the TensorRT plugin is built too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# TensorRT's headers, to compile the plugin: NVIDIA's own of v10.14, or the copy in a package, where git cannot reach them.
# The package is not installed in .venv. The paths are relative, since the folder of the clone may have a space in its name.
HEADERS := build/headers
TENSORRT_URL ?= https://github.com/NVIDIA/TensorRT.git
TENSORRT_COMMIT := 3b4ddc1d45f11167f2ea53dc6046bba8df800e2d
# Folder of a package that carries NVIDIA's tritonserver, for the tests; it is not installed in .venv either.
TRITON := build/triton
# The index that pip searches for PyTorch's CPU build, in addition to the indexes that it is configured with.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Every extra but gpu, whose onnxruntime-gpu takes the place of onnxruntime.
EXTRAS := export,cpu,rtx,openvino,report,parquet,metrics,verify,serve,ray,torch,triton,demo,fuzz,test

# Two processes of one thread each: most of the tests trace and load models, which uses one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# locked: the lock's entries of the packages in the argument (NAME or NAME|NAME), with their hashes; locked_without: all
# the other entries.
locked = sed -En '/^($(1))==/,/[^\\]$$/p' requirements.lock
locked_without = sed -E '/^($(1))==/,/[^\\]$$/d' requirements.lock
# $(call install,VENV,OPTIONS): installs the requirements on its stdin, and checks their hashes.
install = $(1)/bin/python -m pip install --quiet --require-hashes $(2) --requirement /dev/stdin

define PREFLIGHT
import platform, sys
if sys.version_info < (3, 11):
    sys.exit("lfx needs Python 3.11 or later, this is %s; try: make PYTHON=python3.11" % platform.python_version())
if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    sys.exit("make install is for Linux on x86_64, this is %s on %s; install with: pip install '.[export,cpu]'"
             % (platform.system(), platform.machine()))
endef
export PREFLIGHT
# Fetches a commit's folder `include` without the rest of the repository, within two minutes.
define fetch_headers
git init --quiet $(HEADERS)/repository && git -C $(HEADERS)/repository remote add origin $(TENSORRT_URL) \
&& timeout 120 git -C $(HEADERS)/repository fetch --quiet --depth 1 --filter=blob:none origin $(TENSORRT_COMMIT) \
&& timeout 120 git -C $(HEADERS)/repository checkout --quiet FETCH_HEAD -- include \
&& mv $(HEADERS)/repository/include $(HEADERS)/tensorrt && rm -rf $(HEADERS)/repository
endef
# $(call venv,VENV): makes a virtual environment, or says why not.
define venv
@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; try: make PYTHON=python3.11" >&2; exit 1; }
@$(PYTHON) -c "$$PREFLIGHT"
$(PYTHON) -m venv $(1)
endef

.PHONY: clients install demo test test-fast test-lowest check lock fuzz bench figures dist clean

install: $(STAMP)

$(STAMP): pyproject.toml requirements.lock CMakeLists.txt $(wildcard plugins/*.c* plugins/*.h plugins/*/*.*)
	$(call venv,$(VENV))
	# setuptools builds packages of the lock. No more than one retry of TORCH_INDEX, which may be unreachable.
	$(call locked,pip|setuptools) | $(call install,$(VENV))
	@$(call locked,torch) | $(call install,$(VENV),--no-deps --extra-index-url $(TORCH_INDEX) --retries 1) || { echo \
	"PyTorch's CPU build was not found at $(TORCH_INDEX); name another index: make TORCH_INDEX=URL" >&2; exit 1; }
	rm -rf $(HEADERS)
	@($(fetch_headers)) 2>/dev/null || { \
	echo "$(TENSORRT_URL) cannot be fetched; TensorRT's headers are those of the package kernel-lens"; \
	$(call locked,kernel-lens) | $(call install,$(VENV),--no-deps --upgrade --target $(HEADERS)) \
	&& rm -rf $(HEADERS)/repository && ln -s kernel_lens/include/tensorrt $(HEADERS)/tensorrt; }
	$(call locked,nvidia-pytriton) | $(call install,$(VENV),--no-deps --upgrade --target $(TRITON))
	$(call locked_without,kernel-lens|nvidia-pytriton|uv) | $(call install,$(VENV),--no-build-isolation)
	CMAKE_ARGS="$(CMAKE_ARGS) '-DTensorRT_INCLUDE_DIR=$(CURDIR)/$(HEADERS)/tensorrt'" \
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: install  ## Convert and export a trained model, answer questions with it, check parity, compare speed with PyTorch's.
	$(BIN)/python -m scripts.demo

# Clients of the hub's layout that need other versions than lfx does, and those of npm: build/clients/python has only
# what differs, and finds the rest in .venv.
CLIENTS := build/clients
clients: $(CLIENTS)/.installed  ## Set up the environments of the tests with other clients of the hub.

$(CLIENTS)/.installed: $(STAMP) tests/clients/requirements.txt tests/clients/package.json tests/clients/package-lock.json
	rm -rf $(CLIENTS)
	$(PYTHON) -m venv $(CLIENTS)/python
	$(CLIENTS)/python/bin/python -m pip install --quiet --no-deps --requirement tests/clients/requirements.txt
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > build/site-packages
	cp build/site-packages "$$($(CLIENTS)/python/bin/python -c 'import site; print(site.getsitepackages()[0])')/rest.pth"
	mkdir -p $(CLIENTS)/node
	cp tests/clients/package.json tests/clients/package-lock.json $(CLIENTS)/node
	cd $(CLIENTS)/node && npm ci --silent --ignore-scripts
	touch $@

test: install clients  ## Everything; the full-size shapes run last, with all threads.
	$(PYTEST) -m 'not full_size'
	$(BIN)/python -m pytest -m full_size

test-fast: install  ## A cut through all parts, for every change: without the long lists of cases and real servers.
	$(PYTEST) -m 'not slow'

test-lowest: .venv-lowest/.installed  ## All but the full-size shapes, on the lowest versions that pyproject.toml allows.
	$(subst $(BIN),.venv-lowest/bin,$(PYTEST)) -m 'not full_size'

.venv-lowest/.installed: pyproject.toml constraints-lowest.txt requirements.lock
	rm -rf .venv-lowest
	$(call venv,.venv-lowest)
	$(call locked,pip|setuptools) | $(call install,.venv-lowest)
	$(call locked,nvidia-pytriton) | $(call install,.venv-lowest,--no-deps --upgrade --target $(TRITON))
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt \
		--extra-index-url $(TORCH_INDEX) --retries 1 --no-deps torch
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --group build
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --no-build-isolation \
		--editable '.[$(EXTRAS)]'
	touch $@

check: install  ## Lint, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock:  ## Write requirements.lock again from pyproject.toml; OPTIONS=--upgrade takes the newest versions.
	$(call venv,.venv-lock)
	$(call locked,uv) | $(call install,.venv-lock)
	.venv-lock/bin/python scripts/lock.py $(OPTIONS)

fuzz: install  ## Fuzz inputs, documents, manifests and ONNX files for MINUTES; writes docs/records/fuzz.jsonl.
	OMP_NUM_THREADS=1 $(BIN)/python scripts/fuzz.py --minutes $(or $(MINUTES),10)

bench: install clients  ## All CPU benchmarks, more than an hour; writes docs/records and the tables made from it.
	$(BIN)/python -m scripts.support
	$(BIN)/python -m scripts.compatibility
	$(BIN)/python -m scripts.bench.cpu
	$(BIN)/python -m scripts.bench.long
	$(BIN)/python -m scripts.bench.generation
	$(BIN)/python -m scripts.bench.backends
	$(BIN)/python -m scripts.bench.kernels
	$(BIN)/python -m scripts.bench.runtime
	$(BIN)/python -m scripts.bench.serve
	$(BIN)/python -m scripts.bench.triton
	$(BIN)/python -m scripts.bench.ray_map
	$(BIN)/python -m scripts.bench.torch_ops
	$(BIN)/python -m scripts.bench.peers
	$(BIN)/python scripts/tables.py
	$(BIN)/python scripts/figures.py

figures: install  ## Draw docs/figures from the running code.
	$(BIN)/python scripts/figures.py

dist: install  ## Build the sdist, a wheel with the plugin and one without, and try both wheels in empty environments.
	rm -rf dist
	$(BIN)/python scripts/build_dist.py

clean:
	rm -rf build dist $(VENV) .venv-lowest .venv-lock
