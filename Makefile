# Everything lives in .venv; nothing outside this folder is changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Which torch pip installs. PyPI's build for Linux brings 3 GB of CUDA along; PyTorch's own index has one for CPUs. pip
# prefers that (2.13.0+cpu sorts after 2.13.0) where it can reach the index, and does without where it cannot. What torch
# itself needs comes with the package.
TORCH_INSTALL ?= torch==2.13.0 --no-deps --extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15

# The release of transformers that is built on; .ci/run tests others too. The package itself takes any from 5.22 on.
TRANSFORMERS ?= 5.24.0

CXX_FILES := $(wildcard csrc/*/*.h csrc/*/*.cpp)
OTHER_CXX_FILES := $(wildcard tests/native/*.h tests/native/*.cpp tests/fuzz/*.cpp tools/wheel/*.cpp) benchmarks/limits.cpp

.DELETE_ON_ERROR:
.PHONY: help demo chat test fuzz-files fuzz-reader fuzz-native test-native test-triton test-gpu compile-kernels lint bench \
    bench-models wheel bench-gpu test-wheel test-recipes load-server check-forecast clean

help:
	@echo "make demo         set up .venv, then watch the bundled model think and answer"
	@echo "make chat         talk to it"
	@echo "make test         run the tests"
	@echo "make test-native  run tests/native under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer"
	@echo "make fuzz-files   try 20,000 damaged files, each in a process of its own"
	@echo "make fuzz-reader  run atheris on the reader of files for half an hour; FUZZ_SECONDS=60 for a minute"
	@echo "make fuzz-native  run libFuzzer on the C++ code likewise, under sanitizers; needs clang"
	@echo "make test-triton  run the tests of GPU kernels, interpreted where there is no GPU"
	@echo "make test-gpu     run the tests that need a GPU"
	@echo "make compile-kernels  compile the GPU kernels for GPUs that need not be here"
	@echo "make test-recipes run the examples that need PEFT, xgrammar, LangChain and lm-eval"
	@echo "make load-server  500 requests at a server, half of them left, and what memory it holds"
	@echo "make lint         check formatting, style and types"
	@echo "make bench        measure kernels and MoE layers; BENCH=--benchmark-compare sets them against the last run"
	@echo "make bench-models measure a whole model, and its peers where they are installed"
	@echo "make check-forecast  whether models decode as fast as doctor says"
	@echo "make bench-gpu    ten minutes of measurements on a GPU that torch sees"
	@echo "make wheel        build dist/*.whl for manylinux_2_28"
	@echo "make test-wheel   build it and test it in an empty environment"
	@echo "make test-transformers-5.23.0    run what depends on it with another transformers, which stays"
	@echo "make clean        remove .venv and all build products"

demo: $(VENV)/.installed
	$(BIN)/python examples/chat.py --prompt_file examples/question.txt

chat: $(VENV)/.installed
	@$(BIN)/python examples/chat.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

# CMakePresets.json says what each build has. setarch -R, because the ThreadSanitizer of gcc before 13 knows no kernel that
# spreads mappings over more than 28 bits of addresses.
test-native: $(addprefix test-native-,asan tsan)

test-native-%: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset $* --log-level=WARNING -DTKT_WERROR=$${TKT_WERROR:-OFF}
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset $*
	$$(setarch -R true 2>/dev/null && echo setarch -R) build/native-$*/native_tests

# Kernels, files and rules are the same whatever transformers is installed.
test-transformers-%: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet transformers==$*
	$(BIN)/python -m pytest tests/families tests/integration tests/models tests/modules tests/planning

# The tests try 150 of them.
fuzz-files: $(VENV)/.installed-test
	PYTHONPATH=tests/support $(BIN)/python tests/support/damaged_files.py

# What they find is written to build/fuzz, beside the inputs that reached something new.
FUZZ_SECONDS ?= 1800
FUZZ_LIMITS = -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=1024 -malloc_limit_mb=200 -timeout=300 -print_final_stats=1

fuzz-reader: $(VENV)/.installed-fuzz
	mkdir -p build/fuzz
	$(BIN)/python tests/fuzz/reader.py build/fuzz/reader -max_len=60000 -artifact_prefix=build/fuzz/reader- $(FUZZ_LIMITS)

fuzz-native: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset fuzz --log-level=WARNING
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset fuzz
	mkdir -p build/fuzz/native
	build/native-fuzz/fuzz_entry_points build/fuzz/native -max_len=4096 -len_control=0 -artifact_prefix=build/fuzz/native- $(FUZZ_LIMITS)

test-recipes: $(VENV)/.installed-test $(VENV)/.installed-recipes
	$(BIN)/python -m pytest tests/test_recipes.py

# The tests send 48 requests.
load-server: $(VENV)/.installed-test
	PYTHONPATH=tests/support $(BIN)/python tests/support/server_load.py

# Kernels for GPUs, interpreted where there is none. Apart, because triton is a gigabyte.
test-triton: $(VENV)/.installed-test $(VENV)/.installed-gpu
	$(BIN)/python -m pytest tests/backends/test_triton_*.py tests/models/test_triton_*.py

# TORCH_INSTALL= of a make before says which torch: that for CPUs, which is the default here, sees no GPU.
test-gpu: $(VENV)/.installed-test $(VENV)/.installed-gpu
	@$(BIN)/python -c "import torch; torch.cuda.is_available() or exit('torch sees no GPU here: NOTHING was tested')"
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest tests/backends/test_gpu_device.py tests/backends/test_triton_*.py

compile-kernels: $(VENV)/.installed-gpu
	$(BIN)/python -W ignore tools/compile_kernels.py --table benchmarks/gpu_kernels.md

# TORCH_INSTALL= of a make before says which torch, as for test-gpu.
bench-gpu: $(VENV)/.installed-bench $(VENV)/.installed-gpu
	$(BIN)/python benchmarks/bench_gpu.py --out build/gpu

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES) $(OTHER_CXX_FILES)
	@awk 'length > 120 { print FILENAME ":" FNR ": over 120 columns"; bad = 1 } END { exit bad }' $(CXX_FILES) \
	    $(OTHER_CXX_FILES)

# Options of pytest and pytest-benchmark: make bench BENCH="-k Q4_K --benchmark-compare"
BENCH ?=

bench: $(VENV)/.installed-bench
	$(BIN)/python -m pytest benchmarks/bench_kernels.py benchmarks/bench_moe.py --benchmark-storage build/benchmarks \
	    --benchmark-autosave --benchmark-columns median,iqr,rounds,iterations $(BENCH)

build/bench-4-layers.gguf: tests/support/synthetic.py $(VENV)/.installed-test
	mkdir -p build
	$(BIN)/python tests/support/synthetic.py v2-lite q4_k_m $@ --layers 4

# While nothing else runs.
check-forecast: $(VENV)/.installed-test build/bench-4-layers.gguf
	$(BIN)/python tools/check_forecast.py tiny-r1 build/bench-4-layers.gguf

bench-models: $(VENV)/.installed-bench build/bench-4-layers.gguf
	$(BIN)/python benchmarks/bench_generate.py build/bench-4-layers.gguf --rounds 1 --json build/bench-generate.json \
	    --plot build/bench-generate.png

# Without isolation and in the folder of the editable build: nothing is compiled twice.
wheel: $(VENV)/.installed-dev
	rm -rf build/wheel dist
	TKT_MANYLINUX=ON $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --plat manylinux_2_28_x86_64 --only-plat --wheel-dir dist \
	    build/wheel/*.whl

test-wheel: wheel
	WHEEL=$$(echo dist/*.whl) $(BIN)/python -m pytest tests/test_wheel.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch:
	@tools/check-tools.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH_INSTALL)
	$(BIN)/python -m pip install --quiet transformers==$(TRANSFORMERS)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml CMakeLists.txt $(CXX_FILES)
	tools/install.sh $(VENV)
	@touch $@

# The package is there already: pip adds what the extra names.
$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet 'transformers-kt-experts[$*]'
	@touch $@
