PYTHON ?= python3
HOST ?= 127.0.0.1
HTTP_PORT ?= 8000
GRPC_PORT ?= 8001
METRICS_PORT ?= 8002
MODEL_REPOSITORY ?= model_repository
MODELS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?= all
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup tools demo serve test test-fast lint fmt docs bench bench-peers gpu-check clean distclean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

setup: ## install packages, server and the two models (PYTHON=python3)
	@$(PYTHON) scripts/bootstrap.py

demo: setup ## start a server, show what it does, stop it
	@$(BIN)/python scripts/demo.py

serve: setup ## serve until Ctrl-C (MODELS=tandem, MODEL_REPOSITORY, HOST, HTTP_PORT, GRPC_PORT, METRICS_PORT)
	@$(BIN)/python scripts/serve.py --host $(HOST) --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) \
		--metrics-port $(METRICS_PORT) --model-repository $(MODEL_REPOSITORY) --models $(MODELS)

test: setup tools .checkov/.stamp ## run the tests (PYTEST_ARGS="-k cache")
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: setup tools .checkov/.stamp ## run what needs no server and is quick: five minutes
	@$(BIN)/python -m pytest -m "not server and not slow" $(PYTEST_ARGS)

tools: setup
	@$(BIN)/python scripts/fetch_tools.py

# In an environment of its own: it wants older packages than the rest.
.checkov/.stamp: requirements-checkov.txt
	@$(PYTHON) -m venv --clear .checkov
	@.checkov/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

lint: setup ## check style, types and imports; changes nothing
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

fmt: setup ## format the code and fix what can be fixed
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

docs: setup ## build the pages in docs/ as a site, in site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: setup ## measure everything, for hours (BENCH_ARGS="engine -c 1 8")
	@$(BIN)/python scripts/bench.py $(BENCH_ARGS)

bench-peers: setup ## install vLLM in .vllm, for the benchmark to compare with
	@$(BIN)/python scripts/bench_peers.py

# No setup: where the GPU is there may be no network.
gpu-check: ## check a GPU in a few minutes; a dry run without one (PYTHON=.venv/bin/python)
	@$(PYTHON) scripts/gpu_check.py

clean: ## remove what builds and tools leave behind
	@rm -rf build dist site *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## also remove what was set up: .venv, .checkov, .tools, .triton, .models, .vllm, .clients
	@rm -rf .venv .checkov .tools .triton .models .vllm .clients .bench .setup.lock
