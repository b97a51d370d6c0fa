# The two commands of the README are `make demo` and `make test`; both start from nothing but Python and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test bench fuzz clean

demo: $(INSTALLED)
	$(BIN)/gradproj demo --output demo-output

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2

bench: $(INSTALLED)
	$(BIN)/python benchmarks/overhead.py --output benchmarks/results/overhead.json
	$(BIN)/python benchmarks/verify.py

fuzz: $(INSTALLED)
	GRADPROJ_FUZZ_EXAMPLES=20000 GRADPROJ_KILLS=200 $(BIN)/python -m pytest -k 'damage or any_ or kill' \
		tests/test_verification.py tests/test_adapter_folder.py tests/test_refit.py tests/test_atomic_saving.py

# torch first and by its exact version: a bare requirement would bring a build with CUDA, several gigabytes large.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) demo-output build dist *.egg-info
