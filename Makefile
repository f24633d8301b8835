# Each target does all of its own set-up: Python, git and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# .ci/lower-bounds.txt, in a new $(VENV), for the oldest versions that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# Python compiles what is imported when it is imported: for all of what is installed that would take longer.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c $(CONSTRAINTS)
# What it has compiled stays, then: else each process of a test compiles torch anew, for three seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test suite beside slow slow-suite slow-interpreted libraries fuzz sanitize lint format docs hub-kernel bench baselines tune ci clean

demo: $(VENV)/.demo
	$(BIN)/negmerge demo

# Two processes beside each other, which take as long: most of the suite; and the tests that start processes, after those of equality under
# Triton's interpreter and those of deltas.
# Threads that wait for work sleep: those of two processes would take the two cores from each other, and a third more of the time.
test suite beside slow-suite slow-interpreted libraries: export OMP_WAIT_POLICY = PASSIVE

test: $(VENV)/.test
	@$(MAKE) --no-print-directory -j2 suite beside

suite beside: DELTAS = tests/backends/test_delta.py

suite: $(VENV)/.test
	$(BIN)/python -m pytest -m 'not slow and not libraries and not processes' --ignore=$(DELTAS)

beside: $(VENV)/.test
	(TRITON_INTERPRET=1 $(BIN)/python -m pytest -k BF16 tests/backends/test_same_bits.py tests/backends/test_apply_same_bits.py && \
	  $(BIN)/python -m pytest $(DELTAS) && \
	  $(BIN)/python -m pytest -m 'processes and not slow' $$(grep -rl --include='test_*.py' pytest.mark.processes tests)) \
	  >$(VENV)/$@.log 2>&1; status=$$?; cat $(VENV)/$@.log; exit $$status

# Lengths beyond 2^31 and 2^32, kills at random moments, waits: 4 GiB of memory, some minutes.
slow: slow-suite slow-interpreted

slow-suite: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

slow-interpreted: $(VENV)/.test
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m slow -k 'not 32_bits' tests/backends/test_same_bits.py
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -k 'not BF16' tests/backends/test_same_bits.py tests/backends/test_apply_same_bits.py
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -k written_out tests/backends/test_low_rank.py
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -k test_same_bits tests/backends/test_family_same_bits.py

# Models of transformers, sentence-transformers, diffusers, PEFT, timm and open_clip, saved, merged and loaded by these; the same YAML by mergekit and here. One of their packages has a model of 83 MB.
libraries: $(VENV)/.libraries
	$(BIN)/python -m pytest -m libraries --disable-warnings tests/libraries tests/docs

# Ten minutes of models with a few things wrong; SECONDS=60 for one. What fails is saved in fuzz-found/.
fuzz: $(VENV)/.fuzz
	$(BIN)/python tests/support/fuzz.py --seconds $(or $(SECONDS),600)

sanitize:
	tests/support/sanitize/run

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python .ci/terms.py

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in build/docs/.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The Triton kernel as Hugging Face's package `kernels` loads it, in build/hub-kernel/.
hub-kernel:
	$(PYTHON) hub/build.py

# Prints tables, appends to bench/results/, draws, and writes the tables of docs/benchmarks.md, of what was measured where cases fail; needs 12 GB of memory for all of the usual cases, 3 GB of disk.
bench: $(VENV)/.test
	@status=0; $(BIN)/python -m pytest bench || status=$$?; \
	  $(BIN)/python bench/docs.py && $(BIN)/python bench/plots.py && exit $$status

# Whole merges of files, beside scripts and other tools, each in an environment of its own: 11 GB of disk, 2 GB of tmpfs, 15 minutes.
baselines: $(VENV)/.test
	$(BIN)/python bench/processes/baselines.py
	$(BIN)/python bench/docs.py

# Measures what the constants in the code were or will be chosen by, and appends to bench/results/: those of the reference, of
# the CPU kernel, of deltas (7 GB of memory), of low-rank models (3 GB), of streaming (3 GB of disk, a tmpfs) and, on a GPU, of the kernels there.
tune: $(VENV)/.test
	$(BIN)/python bench/tuning/reference.py
	$(BIN)/python bench/tuning/loop.py
	$(BIN)/python bench/tuning/plain_loop.py
	$(BIN)/python bench/tuning/threads.py
	$(BIN)/python bench/tuning/delta.py
	$(BIN)/python bench/tuning/low_rank.py --merged --candidates
	$(BIN)/python bench/tuning/chunk_sizes.py
	$(BIN)/python bench/tuning/reads.py
	$(BIN)/negmerge demo --seeds 3
	$(BIN)/python bench/tuning/scales.py
	$(BIN)/python bench/tuning/tune_gpu.py

ci:
	.ci/run

clean:
	git clean -xfd

# The package and its kernels are built once, with what the demo needs, as all others do; what they need beyond that comes on top.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*)
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.test $(VENV)/.libraries $(VENV)/.fuzz $(VENV)/.lint $(VENV)/.docs: $(VENV)/.%: $(VENV)/.demo
	$(PIP) 'negmerge_fast[$*]'
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
