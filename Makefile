# Two commands: `make demo` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
ARGS ?=
TWO := -n 2 --dist worksteal  # two processes; who is done first takes from the other

.PHONY: demo test test-next lint package cuda-check site
demo: $(READY)
	$(VENV)/bin/python examples/demo.py $(ARGS)

# one thread in each process, so that two workers on two cores do not spin against each other
test test-next: export OMP_NUM_THREADS = 1
test: $(READY)
	$(VENV)/bin/python -m pytest $(TWO) $(ARGS)

# with the newest transformers that pyproject.toml allows, beside the one that is pinned
test-next: $(READY)
	$(VENV)/bin/python -m pip install -q --no-deps --upgrade --target $(VENV)/next transformers==5.24.0
	PYTHONPATH=$(VENV)/next $(VENV)/bin/python -m pytest $(TWO) $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# wheel and sdist, checked, and the wheel's command run from a folder of its own
package: $(READY)
	rm -rf dist build/wheel
	$(VENV)/bin/python -m build -q --installer pip
	$(VENV)/bin/twine check --strict dist/*
	$(VENV)/bin/python -m pip install -q --no-deps --target build/wheel dist/*.whl
	cd build && PYTHONPATH=wheel ../$(VENV)/bin/python -P -c "import trimtab; assert 'wheel' in trimtab.__file__; print(trimtab.__file__)"
	cd build && PYTHONPATH=wheel ../$(VENV)/bin/python -P -m trimtab --help > /dev/null

# needs no network and nothing but the packages that PY has: `make cuda-check PY=python3` uses another interpreter's
PY ?= $(VENV)/bin/python
cuda-check:
	@PYTHONPATH=src $(PY) -c "import torch; raise SystemExit(not torch.cuda.is_available())" 2>/dev/null \
	  && PYTHONPATH=src $(PY) -m pytest -q -m cuda tests/test_cuda.py $(ARGS) || \
	  { PYTHONPATH=src $(PY) -c "import torch; raise SystemExit(torch.cuda.is_available())" && echo "skipped: no CUDA device"; }

# torch first and by its pinned version: an open range may bring a build for GPUs, gigabytes larger
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch==2.13.0
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[dev,serve,audit]"
	@touch $@

# the documentation, into build/site; any warning is an error
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build -q --strict
