# make demo     set everything up, fine-tune a small model on an invented shop's tickets, show before and after
# make setup    only the virtual environment
# make test     the tests            make test-gpu   those that need an NVIDIA GPU
# make check    format, lint, types, layers
# make fuzz     damage tens of thousands of files and count what comes of reading them; eight minutes
# make wheel    build the wheel, and try it in a fresh environment; PYTHONS='python3.11 python3.13' tries it in several
# make bench    time the operations; ONLY=load,train times some of them
# make load     a million lines, a thousand shards, 32k context, rank 512: seconds and memory; half an hour
# make faults   kill trainings 200 times at random moments, and compare what they come to

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
# Without a GPU one release is named: a bare `torch` resolves to the newest one, with gigabytes of CUDA libraries. Its
# CPU build brings no triton, which the interpreted kernel tests want; with CUDA, torch brings the triton it was made with.
TORCH := $(if $(HAS_GPU),torch,torch==2.13.0 $(if $(filter Linux,$(shell uname -s)),triton==3.6.0))

.PHONY: setup demo test test-gpu check format wheel bench faults fuzz load clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo 'installing into .venv: a few minutes, once'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[test]' -c constraints.txt
	touch $@

demo: setup
	model=$$($(BIN)/python tools/demo_model.py) && $(BIN)/python -m examples.shop.demo "$$model"

test: setup
	$(BIN)/python -m pytest -q

test-gpu: setup
	$(BIN)/python -m pytest -q -m gpu

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: setup
	$(BIN)/python -m tools.try_wheel $(PYTHONS)

bench: setup
	$(BIN)/python -m benchmarks.run $(if $(ONLY),--only $(ONLY))

fuzz: setup
	$(BIN)/python -m benchmarks.fuzz_readers

load: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.load

faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.faults --kills 200

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis
