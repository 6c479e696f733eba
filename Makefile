# `make test` and `make demo` build their own virtual environment in .venv. On a machine without a GPU
# the CPU build of torch is smaller:  make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# The tests' tensors are small: two processes of one thread each are quicker than one of two threads.
RUN_TESTS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest

.PHONY: demo test test-all lint format bench clean

demo: $(STAMP)
	$(BIN)/ppl-seg demo --out demo

test: lint
	$(RUN_TESTS) $(PYTEST_FLAGS)

test-all: lint
	$(RUN_TESTS) $(PYTEST_FLAGS) -m "slow or not slow" --cov --cov-report=term-missing:skip-covered

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy -p ppl_seg

format: $(STAMP)
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python scripts/benchmark_speed.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "No '$(PYTHON)' here: install Python 3.11 or newer, or run make with PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ppl_seg needs Python 3.11 or newer; $$($(PYTHON) --version) found: run make with PYTHON=python3.11 (or newer)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	touch $@
