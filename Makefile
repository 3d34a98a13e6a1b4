# Every target does the set-up it needs; a second run finds it done. `make` alone lists the targets.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup tools demo test test-gpu fuzz processes kernels matrix clients lint style format sanitize bench bench-table evidence wheel clean

VENV ?= .venv
BIN := $(VENV)/bin
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' 2>/dev/null)
export VENV
# Where it is set, each of the processes of the tests would compile all Python that it imports.
unexport PYTHONDONTWRITEBYTECODE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## virtual environment, torch, what the demo needs, extension (PYTHON=, TORCH=, CXX=, MAX_JOBS= choose others)
	@bash .ci/setup.sh

tools: ## the same, and what the tests need
	@bash .ci/setup.sh dev

demo: setup ## fine-tune MiniLM on film reviews, with stock PEFT and with SAFE (ARGS="--help" for its options)
	@$(BIN)/python examples/demo.py $(ARGS)

test: style ## lint, types and every test (ARGS= goes to pytest)
	@$(BIN)/mypy >build/mypy.log 2>&1 & types=$$!; \
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS); \
	code=$$?; wait $$types || code=1; cat build/mypy.log; exit $$code

test-gpu: tools ## the kernels on this machine's GPUs, compared with float64 and with the CPU kernels (ARGS= goes to pytest)
	@HF_HUB_OFFLINE=1 $(BIN)/pytest tests/gpu $(ARGS)

fuzz: tools ## random programs over stock PEFT and over bound models, for MINUTES=30 (ARGS="--seed 1" repeats a run)
	@$(BIN)/python tests/fuzz/fuzz.py --minutes $(or $(MINUTES),30) $(ARGS)

processes: tools ## DDP and FSDP2 on four processes, and a compiled model on two (ARGS= goes to pytest)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest tests/peft/distributed/slow_processes.py $(ARGS)

kernels: tools ## the kernels for GPUs, without one: run in Triton's interpreter, compiled for each kind of GPU
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal tests/triton/interpreted $(ARGS)
	@OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal tests/triton/compiled $(ARGS)

matrix: ## the tests with other releases of torch, transformers, peft (CORNERS="oldest image middle newest adapterhub")
	@ARGS="$(ARGS)" bash .ci/matrix.sh $(CORNERS)

clients: ## the recipes inside TRL, sentence-transformers, diffusers, Lightning, timm and accelerate (ARGS= goes to pytest)
	@ARGS="$(ARGS)" bash .ci/clients.sh

lint: style ## ruff, clang-format, mypy, and words that are hard to read
	@$(BIN)/mypy

style: tools
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/clang-format --dry-run --Werror $(CPP)
	@bash .ci/words.sh

format: tools ## format Python and C++ in place
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(CPP)

sanitize: tools ## the extension's tests under AddressSanitizer and UBSan
	@PYTHON="$(abspath $(BIN))/python" bash tests/cpp/run_sanitized.sh $(ARGS)

BENCH := HF_HUB_OFFLINE=1 $(BIN)/pytest --benchmark-columns=median
MEMORY := bench/training/bench_retention.py bench/training/bench_peak.py
LAUNCHES := bench/kernels/bench_launches.py
FAMILIES := $(patsubst %,bench/training/bench_%.py,families conv experts bottleneck)

bench: tools ## measure memory, training steps and ops, compared with stock PEFT (ARGS= goes to pytest)
	@$(BENCH) $(MEMORY) --benchmark-json=bench/results/cpu-memory.json $(ARGS)
	@$(BENCH) bench/training $(patsubst %,--ignore=%,$(MEMORY) $(FAMILIES)) --benchmark-json=bench/results/cpu-training.json $(ARGS)
	@$(BENCH) $(FAMILIES) --benchmark-json=bench/results/cpu-families.json $(ARGS)
	@$(BENCH) bench/kernels --ignore=$(LAUNCHES) --benchmark-json=bench/results/cpu-kernels.json $(ARGS)
	@$(BENCH) $(LAUNCHES) --benchmark-json=bench/results/cpu-launches.json $(ARGS)

bench-table: tools ## write the tables of docs/benchmarks.md and the README's picture from the newest results
	@$(BIN)/python bench/table.py $(patsubst %,bench/results/cpu-%.json,memory training families kernels launches) --write docs/benchmarks.md
	@$(BIN)/python bench/picture.py bench/results/cpu-memory.json docs/retained.svg

evidence: setup ## the experiments of docs/evidence.md that have not run yet (PART=oracle, windows, curves, flatness, table or summary; ARGS="--seeds 0,1")
	@PYTHONPATH=examples:bench:bench/training $(BIN)/python -m evidence $(or $(PART),summary) $(ARGS)

wheel: tools ## a wheel for the torch that is installed: dist/
	@$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean: ## remove the set-up and everything built, not the cache of models and data
	@rm -rf $(VENV) build *.egg-info safe_kernels/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
