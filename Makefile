# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
COMPRESS := .venv/compress/bin
SERVE := .venv/serve/bin
SHELL := /bin/bash

.PHONY: demo test lint test-compress test-serve fixture environments clean

demo: environments
	$(COMPRESS)/python -m integration.demo --serve-python $(SERVE)/python

test: lint test-compress test-serve

environments: .venv/compress/.ready .venv/serve/.ready

# The stamp is written last, so an interrupted installation is done again.
.venv/%/.ready: requirements/%.txt pyproject.toml requirements/vllm_shim.py
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

fixture: .venv/compress/.ready
	$(COMPRESS)/python -m integration.fixture.train

clean:
	rm -rf .venv build
