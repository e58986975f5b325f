# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
COMPRESS := .venv/compress/bin
SERVE := .venv/serve/bin
SHELL := /bin/bash
KERNELS := $(wildcard moe_collab/kernels/cpu/*.cpp moe_collab/kernels/cpu/*.h)

.PHONY: demo test lint test-compress test-serve test-asan bench-cpu fixture environments clean

demo: environments
	$(COMPRESS)/python -m integration.demo --serve-python $(SERVE)/python

test: lint test-compress test-serve test-asan

environments: .venv/compress/.ready .venv/serve/.ready

# The stamp is written last, so an interrupted installation is done again.
.venv/%/.ready: requirements/%.txt pyproject.toml setup.py requirements/vllm_shim.py $(KERNELS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "moe-collab needs Python 3.11 or later; name one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv --clear .venv/$*
	.venv/$*/bin/pip install --quiet --no-deps -r requirements/$*.txt
	.venv/$*/bin/pip install --quiet --no-deps --no-build-isolation -e .
	if [ $* = serve ]; then $(SERVE)/python requirements/vllm_shim.py; fi
	touch $@

lint: .venv/compress/.ready
	$(COMPRESS)/ruff check .
	$(COMPRESS)/ruff format --check .
	$(COMPRESS)/mypy
	$(COMPRESS)/lint-imports

test-compress: .venv/compress/.ready
	$(COMPRESS)/python -m pytest tests --ignore tests/serving

test-serve: .venv/serve/.ready
	$(SERVE)/python -m pytest tests --ignore tests/modifiers --ignore tests/integration

# The kernels' tests with every access checked: a copy of the package, so that the installed library stays as it is.
test-asan: .venv/serve/.ready
	rm -rf build/asan && mkdir -p build/asan && cp -r moe_collab tests pyproject.toml build/asan
	cd build/asan && ../../$(SERVE)/python moe_collab/kernels/cpu/build.py -fsanitize=address,undefined -fno-sanitize-recover -O1 -g
	cd build/asan && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. ../../$(SERVE)/python -m pytest -q tests/kernels -k cpu

fixture: .venv/compress/.ready
	$(COMPRESS)/python -m integration.fixture.train

clean:
	rm -rf .venv build
