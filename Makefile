# Everything runs inside .venv, which the first command makes. `make help` lists what there is.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help developing setup setup-newest demo demo-corpus crossover fair-fight reversal test test-slow test-all test-cluster test-browser test-versions cluster-packages browser-packages crash-drill check format clean

help: ## What there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name what; do printf 'make %-17s %s\n' "$$name" "$$what"; done

setup: .venv/installed ## Install what running needs, in the versions of constraints.txt, into .venv

# Developers' tools come with the first command that needs them.
developing: .venv/developing

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11: run make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/made requirements.txt constraints.txt pyproject.toml
	$(PIP) -c constraints.txt -e .
	@touch $@

.venv/developing: .venv/installed requirements-dev.txt
	$(PIP) -c constraints.txt -r requirements-dev.txt
	@touch $@

setup-newest: .venv/made ## The newest versions that requirements.txt allows, instead of those tested together
	$(PIP) --upgrade --upgrade-strategy eager -e . -r requirements-dev.txt
	@touch .venv/installed .venv/developing

demo: setup ## Facts learned in one direction and asked in the other, MDM beside AR: runs/demo/demo.html
	$(BIN)/python tools/demo.py

demo-corpus: setup ## The whole job on a corpus: Python's standard library
	$(BIN)/python tools/demo_corpus.py

crossover: setup ## AR against MDM on little data; what is done is not run again
	$(BIN)/python tools/crossover.py

FAIR := runs/fair-fight/data
fair-fight: setup ## AR and diffusion, each tuned by as many trials, on few functions of Python's library
	$(BIN)/mdm gather-stdlib --functions --valid-fraction 0.2 --output $(FAIR)/text
	$(BIN)/mdm tokenizer train --input $(FAIR)/text/train.jsonl --vocab-size 257 --output $(FAIR)/tokenizer
	$(BIN)/mdm prepare --input $(FAIR)/text/train.jsonl --tokenizer $(FAIR)/tokenizer --output-prefix $(FAIR)/train
	$(BIN)/mdm prepare --input $(FAIR)/text/valid.jsonl --tokenizer $(FAIR)/tokenizer --output-prefix $(FAIR)/valid
	$(BIN)/mdm subset --input $(FAIR)/train --tokens 24576 --output-prefix $(FAIR)/train
	$(BIN)/mdm contest configs/fair_fight/bytes.yaml --jobs 2

reversal: setup ## The reversal curse with three seeds; what is done is not run again
	$(BIN)/python tools/reversal.py

# Of tests with many cases on ranks a covering set (tests/covering.py). TEST_PROCESSES=2: two processes share the tests; tests/conftest.py says which stay together.
# TEST_THREADS=2: each process of the tests computes with two threads; by default one.
test: developing ## Tests of everything, without slow ones, and a covering set of cases on ranks
	$(BIN)/python -m pytest $(if $(TEST_PROCESSES),-n $(TEST_PROCESSES))

test-slow: developing ## The same with slow tests
	$(BIN)/python -m pytest --slow $(if $(TEST_PROCESSES),-n $(TEST_PROCESSES))

test-all: developing ## Every test and every case
	$(BIN)/python -m pytest --all $(if $(TEST_PROCESSES),-n $(TEST_PROCESSES))

test-cluster: developing ## Two nodes of a real SLURM, and two hosts: as root, after cluster-packages
	$(BIN)/python -m pytest tests/slurm tests/hosts

test-browser: developing ## Pages in a real browser, after browser-packages
	$(BIN)/python -m pytest tests/browser

# Exports in other versions of transformers, about a minute, and a proof's pack in Python 3.12 with another PyTorch, which pip fetches: 6 GB, minutes. PROOF_PYTHON=/path/to/python names one that is there.
test-versions: developing ## Exports in other versions of transformers, a GPU proof in another PyTorch
	TEST_REGISTRY=1 $(BIN)/python -m pytest tests/versions

cluster-packages: ## Debian packages of test-cluster, as root
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge iproute2 openmpi-bin openssh-server pdsh >/dev/null

browser-packages: ## The Debian package of test-browser, as root
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null

crash-drill: setup ## Kill runs at random moments and compare them with runs that were never killed
	$(BIN)/python tools/crash_drill.py

check: developing ## Style, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: developing ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove .venv and caches, nothing of yours
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
