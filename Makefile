# Every target installs what it needs first: into .venv, or into the environment that VENV names.
VENV ?= .venv
PYTHON ?= python3
PYTEST_WORKERS ?= 2
RESULTS ?= benchmarks/results/cpu.json
# Empty for tiny sizes, which take minutes.
BENCH_OPTIONS ?= --full
MINUTES ?= 9
DEVICE_OPTIONS ?=
RELIABILITY_OPTIONS ?=
WHEEL_OPTIONS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.fpt-fast-installed
INSTALL_LOG := $(VENV)/fpt-fast-install.log

.DEFAULT_GOAL := help
.PHONY: help install native demo test bench figures device reliability wheels sanitize lint types architecture tests docs browser browser-install benchmarks cold-import clean

help:
	@echo "make demo    preload, train, evaluate and report on the bundled task, into demo-output/"
	@echo "make test    lint, types, architecture, tests, benchmarks as tests, cold import, wheels"
	@echo "make bench   benchmarks with numbers, into $(RESULTS)"
	@echo "make figures the figures of README.md, measured anew"
	@echo "make native  the C++ extension, built in place"
	@echo "make docs    the documentation site, into build/site"
	@echo "make browser the report's tests in Chromium (make browser-install)"
	@echo "make lint    ruff: rules and format      make types   mypy"
	@echo "make device  what needs a GPU: tests, races, benchmarks, tuning (docs/gpu.md)"
	@echo "make reliability  the long attack on the cache, counted in benchmarks/results/reliability.json"
	@echo "make wheels  sdist and wheel, built, installed and used (WHEEL_OPTIONS=--under python...)"
	@echo "make sanitize  the C++ extension under ASan, UBSan and TSan (csrc/README.md)"
	@echo "make clean   remove build products, caches and demo-output/ (not the environment)"

install: $(STAMP)

$(STAMP): pyproject.toml setup.py
	@test -x $(BIN)/python || { \
		$(PYTHON) -c "import sys; sys.exit('fpt-fast needs Python 3.11 or newer: make PYTHON=...' \
			if sys.version_info < (3, 11) else 0)" \
		&& echo "creating $(VENV)" && $(PYTHON) -m venv $(VENV); }
	@echo "installing fpt-fast and its tools into $(VENV) (minutes on a fresh machine)"
	@{ $(BIN)/python -m pip --version || $(BIN)/python -m ensurepip; } > $(INSTALL_LOG) 2>&1; \
		for what in 'torch>=2.10' '-e .[dev]'; do \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $$what \
		>> $(INSTALL_LOG) 2>&1 || { cat $(INSTALL_LOG); exit 1; }; done
	@$(BIN)/fpt-fast info | grep '^native:'
	@touch $@

# Up to date in a second; an editable installation sees it at once.
native: $(STAMP)
	@$(BIN)/python setup.py --quiet build_ext --inplace

demo: native
	$(BIN)/fpt-fast demo --output demo-output

test: native lint types architecture tests benchmarks cold-import wheels

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

architecture: $(STAMP)
	$(BIN)/python -m pytest -q tests/test_architecture.py

tests: native
	$(BIN)/python -m pytest -q -n $(PYTEST_WORKERS) tests \
		--ignore tests/test_architecture.py --ignore tests/test_import.py --ignore tests/browser

# The documentation site, into build/site.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The report in a real browser: chromium and chromedriver on the PATH.
browser: native
	$(BIN)/python -m pytest -q tests/browser

# As root, on Debian and Ubuntu.
browser-install:
	command -v chromedriver > /dev/null || { apt-get -qq update && apt-get -qq install -y chromium chromium-driver; }

benchmarks: native
	$(BIN)/python -m pytest -q --benchmark-disable benchmarks

# A fresh process in which `import triton` fails.
cold-import: $(STAMP)
	$(BIN)/python -m pytest -q tests/test_import.py

# At the published sizes; leave the machine alone meanwhile.
bench: native
	@mkdir -p $(dir $(RESULTS))
	$(BIN)/python -m pytest -q --benchmark-only $(BENCH_OPTIONS) --benchmark-json=$(RESULTS) benchmarks

# The figures of README.md, docs/benchmarks.md and its plot: every benchmark, then the demo.
figures: bench
	rm -rf demo-output
	$(BIN)/fpt-fast demo --output demo-output
	cp demo-output/demo.json benchmarks/results/demo.json
	$(BIN)/python -m benchmarks.report

# Everything that needs a GPU, within MINUTES, into one JSON of benchmarks/results; docs/gpu.md.
device: $(STAMP)
	$(BIN)/python -m benchmarks.device --minutes $(MINUTES) $(DEVICE_OPTIONS)

# The long form of tests/reliability; RELIABILITY_OPTIONS="--only fuzz --inputs 10000" for a part.
reliability: native
	$(BIN)/python tests/reliability/attack.py $(RELIABILITY_OPTIONS)

# sdist and wheel, each installed in an environment of its own and used; also without a compiler.
wheels: $(STAMP)
	$(BIN)/python scripts/check_wheels.py $(WHEEL_OPTIONS)

sanitize: $(STAMP)
	$(BIN)/python scripts/sanitize.py address
	$(BIN)/python scripts/sanitize.py stack
	$(BIN)/python scripts/sanitize.py thread

clean:
	rm -rf build dist python/fpt_fast/_native* demo-output .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis python/fpt_fast.egg-info
	find fptkernels python tests benchmarks scripts -name __pycache__ -prune -exec rm -rf {} +
