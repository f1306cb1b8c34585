# make setup | demo | crossover | reversal | test | test-slow | test-all | test-cluster | test-browser | test-versions | crash-drill | check. Everything runs inside .venv, which the first command makes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo crossover reversal test test-slow test-all test-cluster test-browser test-versions cluster-packages browser-packages crash-drill check format clean

setup: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11: run make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: setup
	$(BIN)/python tools/demo.py

# AR against masked diffusion on little data, 84 minutes on two cores; what is done is not run again.
crossover: setup
	$(BIN)/python tools/crossover.py

# Facts told in one direction, asked in the other; what is done is not run again.
reversal: setup
	$(BIN)/python tools/reversal.py

# Of tests with many cases on ranks a covering set (tests/covering.py), and no slow ones; with test-slow those too, with test-all everything. TEST_PROCESSES=2: two processes share the tests; tests/conftest.py says which stay together.
# TEST_THREADS=2: each process of the tests computes with two threads; by default one.
test: setup
	$(BIN)/python -m pytest $(if $(TEST_PROCESSES),-n $(TEST_PROCESSES))

test-slow: setup
	$(BIN)/python -m pytest --slow $(if $(TEST_PROCESSES),-n $(TEST_PROCESSES))

test-all: setup
	$(BIN)/python -m pytest --all $(if $(TEST_PROCESSES),-n $(TEST_PROCESSES))

# Two nodes of a real SLURM, and two hosts: as root, with the packages of cluster-packages.
test-cluster: setup
	$(BIN)/python -m pytest tests/slurm tests/hosts

# The replay page in a real browser, with the package of browser-packages.
test-browser: setup
	$(BIN)/python -m pytest tests/browser

# Exports in other versions of transformers, about a minute, and a proof's pack in Python 3.12 with another PyTorch, which pip fetches: 6 GB, minutes. PROOF_PYTHON=/path/to/python names one that is there.
test-versions: setup
	TEST_REGISTRY=1 $(BIN)/python -m pytest tests/versions

cluster-packages:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge iproute2 openmpi-bin openssh-server pdsh >/dev/null

# For tests/browser, as root.
browser-packages:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null

crash-drill: setup
	$(BIN)/python tools/crash_drill.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
