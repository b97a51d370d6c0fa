# The two commands of the README are `make demo` and `make test`; both start from nothing but Python and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test bench bench-overhead fuzz clean

demo: $(INSTALLED)
	$(BIN)/gradproj demo --output demo-output

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2

# More than a day on two cores (docs/benchmark.md says how long); what is there is not run again.
bench: bench-overhead
	$(BIN)/python benchmarks/verify.py
	$(BIN)/python -m benchmarks.second_look --output benchmarks/results/second_look.json
	$(BIN)/python benchmarks/secret_strings.py --output benchmarks/results/secrets.json
	$(BIN)/python -m benchmarks.protection
	$(BIN)/python -m benchmarks.protection --attacks
	$(BIN)/python -m benchmarks.protection --step-times

# Goes on where it was; `rm benchmarks/results/overhead.json` first to measure everything anew.
bench-overhead: $(INSTALLED)
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.overhead_page

# An example takes some 0.03 s of a processor, in each of three tests; others take next to nothing. So this is half an
# hour of processor time, and well within an hour on two cores, of which the longest test occupies one.
FUZZ_EXAMPLES ?= 20000
KILLS ?= 200

fuzz: $(INSTALLED)
	GRADPROJ_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) GRADPROJ_KILLS=$(KILLS) $(BIN)/python -m pytest --numprocesses 2 \
		-k 'damage or any_ or kill' \
		tests/test_verification.py tests/test_adapter_folder.py tests/test_refit.py tests/test_atomic_saving.py

# torch first and by its exact version: a bare requirement would bring a build with CUDA, several gigabytes large.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) demo-output build dist *.egg-info
