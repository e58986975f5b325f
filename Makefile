# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
COMPRESS := .venv/compress/bin
SERVE := .venv/serve/bin
SHELL := /bin/bash
KERNELS := moe_collab/kernels/cpu/_C.so

.PHONY: demo test lint test-compress test-serve test-asan bench-cpu bench-triton-aot bench-gpu bench-allocation bench-pruning bench-recipes bench-scale bench-families fixture environments clean

demo: environments $(KERNELS)
	$(COMPRESS)/python -m integration.demo --serve-python $(SERVE)/python

test: lint test-compress test-serve test-asan

environments: .venv/compress/.ready .venv/serve/.ready

# The stamp is written last, so an interrupted installation is done again.
.venv/%/.ready: requirements/%.txt pyproject.toml setup.py requirements/vllm_shim.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "moe-collab needs Python 3.11 or later; name one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv --clear .venv/$*
	.venv/$*/bin/pip install --quiet --no-deps -r requirements/$*.txt
	.venv/$*/bin/pip install --quiet --no-deps --no-build-isolation -e .
	if [ $* = serve ]; then $(SERVE)/python requirements/vllm_shim.py; fi
	touch $@

# The installation built it; this follows later changes of the sources.
$(KERNELS): $(wildcard moe_collab/kernels/cpu/*.cpp moe_collab/kernels/cpu/*.h) | .venv/serve/.ready
	$(SERVE)/python moe_collab/kernels/cpu/build.py

lint: .venv/compress/.ready
	$(COMPRESS)/ruff check .
	$(COMPRESS)/ruff format --check .
	$(COMPRESS)/mypy
	$(COMPRESS)/lint-imports

test-compress: .venv/compress/.ready $(KERNELS)
	$(COMPRESS)/python -m pytest tests --ignore tests/serving

test-serve: .venv/serve/.ready $(KERNELS)
	$(SERVE)/python -m pytest tests --ignore tests/modifiers --ignore tests/integration
	TRITON_INTERPRET=1 $(SERVE)/python -m pytest tests/kernels/test_triton*.py
	TRITON_INTERPRET=1 MOE_COLLAB_BACKEND=triton $(SERVE)/python -m pytest tests/serving/test_expert_biases.py

# The kernels' tests with every access checked: a copy of the package, so that the installed library stays as it is.
test-asan: .venv/serve/.ready
	rm -rf build/asan && mkdir -p build/asan && cp -r moe_collab tests pyproject.toml build/asan
	cd build/asan && ../../$(SERVE)/python moe_collab/kernels/cpu/build.py -fsanitize=address,undefined -fno-sanitize-recover -O1 -g
	cd build/asan && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. ../../$(SERVE)/python -m pytest -q tests/kernels/test_cpu_*.py tests/rounding

# llama.cpp, the competitor, is compiled from its sources once (6 minutes on one core); without it its column is empty.
.venv/serve/.bench: .venv/serve/.ready
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DGGML_CCACHE=OFF $(foreach part,TOOLS EXAMPLES TESTS SERVER APP,-DLLAMA_BUILD_$(part)=OFF)" \
		$(SERVE)/pip install --quiet --no-deps "llama-cpp-python==0.3.36" || \
		echo "llama.cpp could not be built; the benchmark runs without it"
	touch $@

bench-cpu: environments .venv/serve/.bench $(KERNELS)
	$(SERVE)/python -m integration.benchmarks.cpu
	$(SERVE)/python -m integration.benchmarks.model
	$(COMPRESS)/python -m integration.benchmarks.plot build/bench

# Compiles the GPU kernels for GPUs that need not be here: four minutes.
bench-triton-aot: .venv/serve/.ready
	$(SERVE)/python -m integration.benchmarks.triton_aot

# On a machine with a GPU, in whatever environment has torch and Triton for it (and pydantic and safetensors).
GPU_PYTHON ?= python3
bench-gpu:
	$(GPU_PYTHON) -m integration.benchmarks.gpu

# Resumes where an earlier run was cut off; `rm -r build/bench/allocation` starts anew.
bench-allocation: .venv/compress/.ready
	$(COMPRESS)/python -m integration.benchmarks.allocation

# Resumes too; `rm -r build/bench/pruning` starts anew.
bench-pruning: .venv/compress/.ready
	$(COMPRESS)/python -m integration.benchmarks.pruning

# What the shipped recipes make of both fixtures, with digests to compare two versions by: one hour on one core.
bench-recipes: .venv/compress/.ready
	$(COMPRESS)/python -m integration.benchmarks.recipes

# Memory, reads and time of compressing models from disk: up to 35 GB of room and some hours. Resumes; a row that is
# deleted from build/bench/scale.json is measured anew.
bench-scale: environments $(KERNELS)
	$(COMPRESS)/python -m integration.benchmarks.scale --serve-python $(SERVE)/python
	$(COMPRESS)/python -m integration.benchmarks.plot build/bench

# What works for each family, on tiny random models: half an hour. Writes the table in README.md too.
bench-families: environments $(KERNELS)
	$(COMPRESS)/python -m integration.families --serve-python $(SERVE)/python

fixture: .venv/compress/.ready
	$(COMPRESS)/python -m integration.fixture.train qwen3_moe
	$(COMPRESS)/python -m integration.fixture.train deepseek_v3
	$(COMPRESS)/python -m integration.fixture.train olmoe --seed 7

clean:
	rm -rf .venv build
