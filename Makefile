# `make` lists what there is. `make demo` and `make test` do all of their set-up themselves.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv/bin
CPUS := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# Each worker loads PyTorch once (about 0.5 GB) and starts processes of its own: four are plenty.
WORKERS ?= $(shell [ $(CPUS) -gt 4 ] && echo 4 || echo $(CPUS))
ARGS ?=
# The tests share the cores by processes, not by threads inside PyTorch.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(VENV)/python -m pytest -p randomly
PARALLEL := -n $(WORKERS) --dist worksteal
# ARGS may choose tests that are all in another part.
NONE_IS_FINE := $(if $(strip $(ARGS)),|| [ $$? = 5 ])

SEEDS ?= 2000
RUNS ?= 1000000

.PHONY: help setup demo test test-counted test-slow test-gpu-less test-worlds test-gpu check lint format types imports unit integration sim chaos cluster reliability-report
.PHONY: bench bench-memory bench-reconnect bench-hostile bench-round bench-peers reliability-peers peers coverage clean
.PHONY: bench-codec bench-gpu bench-limit bench-local bench-merge bench-plots bench-startup explore fuzz fuzz-guided sbom dependencies experiments experiments-smoke

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## virtual environment, pinned packages, Mosquitto where permitted (instant when done before)
	@PYTHON="$(PYTHON)" tools/setup.sh $(or $(MAKECMDGOALS),setup)

demo: setup ## four hospitals fine-tune one model over MQTT on this machine: make demo ARGS="--mode fedbuff"
	@$(VENV)/mailboat demo $(ARGS)

# All parts, also when one has failed: whoever waited this long wants to know of everything at once. Where ARGS chooses
# among the tests, coverage says nothing.
test: check ## everything a change must pass: style, types, import rules, all tests, coverage
	@failed=; for part in test-counted test-slow test-gpu-less test-worlds cluster $(if $(strip $(ARGS)),,coverage-gate); do \
		$(MAKE) --no-print-directory $$part || failed="$$failed $$part"; done; \
	[ -z "$$failed" ] || { echo "[test] failed:$$failed (make PART runs one alone)" >&2; exit 1; }

test-counted: setup
	@echo "[test] unit and integration tests in $(WORKERS) processes, with coverage (a few minutes)"
	@rm -f .coverage .coverage.*
	@$(PYTEST) $(PARALLEL) -m "not slow and not cluster" --cov --cov-report=term --ignore=tests/sim $(ARGS) $(NONE_IS_FINE)

test-slow: setup
	@echo "[test] those that train or wait, without coverage, which takes them half as long again (some minutes)"
	@$(PYTEST) $(PARALLEL) -m "slow and not cluster" $(ARGS) $(NONE_IS_FINE)

test-gpu-less: setup
	@echo "[test] what is for a GPU, with the processor in its place: that it runs, no more"
	@$(MAKE) --no-print-directory test-gpu PYTHON=$(VENV)/python ARGS="-q --device cpu $(PARALLEL)"

test-worlds: setup
	@echo "[test] two thousand seeded worlds, which counting lines would slow down"
	@$(PYTEST) $(PARALLEL) tests/sim

# Without set-up, which would put the CPU's PyTorch in the place of one that is built for CUDA.
test-gpu: ## what only a GPU can show, with the numbers seen: make test-gpu PYTHON=python3
	@PYTHONPATH=. OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(or $(PYTHON),$(wildcard $(VENV)/python),python3) -m pytest tests/gpu $(ARGS)

check: setup lint types imports

lint: setup ## ruff: rules and formatting
	@echo "[lint] ruff"
	@$(VENV)/ruff check --quiet .
	@$(VENV)/ruff format --check --quiet . || { echo "[lint] run 'make format'" >&2; exit 1; }

format: setup ## let ruff format the sources and repair what it safely can
	@$(VENV)/ruff format --quiet .
	@$(VENV)/ruff check --fix --quiet .

types: setup ## mypy --strict over sources and tests
	@echo "[types] mypy"
	@$(VENV)/mypy

imports: setup ## import-linter: who may import whom
	@echo "[imports] import-linter"
	@$(VENV)/lint-imports --no-logo > .make/imports.log || { cat .make/imports.log; exit 1; }

unit: setup ## the unit tests alone
	@$(PYTEST) $(PARALLEL) tests/unit $(ARGS)

explore: setup ## the unit tests with new examples, a thousand for each property that names no number
	@MAILBOAT_EXAMPLES=explore $(PYTEST) $(PARALLEL) tests/unit $(ARGS)

chaos: SEEDS = 0-23
chaos: setup ## real processes killed, stopped, cut off and starved of disk, from seeds: make chaos SEEDS=0-23
	@$(VENV)/python -m tests.chaos --seeds $(SEEDS) --json docs/results/chaos.json

reliability-report: setup ## docs/reliability.md anew from docs/results/*.json
	@$(VENV)/python -m tools.reliability_report

bench-memory: setup ## the coordinator's peak memory over 64 uploads of 50 MB, against 2 (3.2 GB of disk)
	@$(VENV)/python -m bench.memory --json docs/results/memory.json

bench-round: setup ## one round of 60 M parameters and four sites, on tmpfs and on the disk (6 GB of each, 9 GB of memory): make bench-round ARGS="--turns 3"
	@$(VENV)/python -m bench.round --disk . --json docs/results/round.json $(ARGS)

# Flower and NVIDIA FLARE, pinned, each in an environment of its own below .bench/.
peers: setup
	@PYTHON=$(VENV)/python bench/peers/setup.sh

bench-peers: peers ## the same round given to Flower and NVIDIA FLARE in turns (as root in a network of its own)
	@$(VENV)/python -m bench.round --runs "mailboat f32" "mailboat bf16" "mailboat int8" flare flower \
		--turns 2 --json docs/results/round.json $(ARGS)

reliability-peers: peers ## the same faults given to Mailboat, Flower and NVIDIA FLARE (over three hours, mostly waiting)
	@$(VENV)/python -m bench.peers.faults --faults "link down" "server killed" "site killed" \
		--json docs/results/peers.json $(ARGS)

bench-reconnect: setup ## how soon bytes move again after outages of 1 s to 150 s, silent and loud (a quarter of an hour)
	@$(VENV)/python -m bench.reconnect --json docs/results/reconnect.json

integration: setup ## the tests with real brokers and processes alone
	@$(PYTEST) $(PARALLEL) tests/integration $(ARGS)

experiments: setup ## methods compared, from experiments/NAME.toml; goes on where it was stopped: make experiments NAME=main JOBS=2
	@$(VENV)/mailboat experiment run $(or $(NAME),main) --jobs $(or $(JOBS),1) $(ARGS)

experiments-smoke: setup ## every part of the experiments with next to no notes (minutes; part of `make test`)
	@$(PYTEST) -n 0 tests/integration/test_experiment.py $(ARGS)

cluster: setup ## a whole run over three NATS servers, one of which is killed
	@echo "[test] a run over three NATS servers, alone: a cluster that is starved chooses leaders for minutes"
	@$(PYTEST) -n 0 -m cluster tests/integration/test_cluster.py

sim: setup ## seeded worlds with every kind of fault, on all cores; goes on where it was stopped: make sim SEEDS=100000
	@$(VENV)/python -m tests.sim --seeds $(SEEDS) --json docs/results/sim.json

coverage: setup ## the last run's coverage, line by line, and the gate
	@$(VENV)/coverage report
	@$(MAKE) --no-print-directory coverage-gate

fuzz: setup ## spoilt bytes into every decoder of foreign bytes: make fuzz RUNS=10000000 SEED=3
	@$(VENV)/python -m tests.fuzz --runs $(RUNS) --seed $(or $(SEED),0)

fuzz-guided: setup ## one decoder by coverage, with atheris: make fuzz-guided TARGET=manifest RUNS=1000000
	@$(VENV)/python -c "import atheris" 2>/dev/null || $(VENV)/python -m pip install --quiet --no-deps atheris==3.0.0
	@$(VENV)/python -m tests.fuzz.guided $(or $(TARGET),none) .make/corpus/$(or $(TARGET),none) -runs=$(RUNS)

bench-codec: setup ## each codec alone: share of float32, error, MB a second and core: make bench-codec ARGS="--turns 9"
	@$(VENV)/python -m bench.codec --json docs/results/codec.json $(ARGS)

bench-local: setup ## full training, layer skipping, kept prefix and LoRA at a site: make bench-local ARGS="--turns 5"
	@$(VENV)/python -m bench.local --json docs/results/local.json $(ARGS)

bench-gpu: setup ## layer skipping on a GPU, LLaMA-3.2-1B's shape: tokens/s, memory, share of peak: make bench-gpu ARGS="--batch 16"
	@$(VENV)/python -m bench.gpu --json docs/results/gpu.json $(ARGS)

bench-startup: setup ## seconds and memory of each command's --help, and of a coordinator up to its first announcement
	@$(VENV)/python -m bench.startup --json docs/results/startup.json $(ARGS)

bench-merge: setup ## parameters a second of a merge, beside the memory's own rate, and its memory (2 GB of RAM disk)
	@$(VENV)/python -m bench.merge --json docs/results/merge.json $(ARGS)

bench-limit: setup ## each step of a round alone, beside a whole round: what no round gets below (5 GB of RAM disk, minutes)
	@$(VENV)/python -m bench.limit --json docs/results/limit.json $(ARGS)

bench-plots: setup ## pictures of the results of these, for docs/performance.md
	@$(VENV)/python -m bench.plots

bench-hostile: setup ## how much slower a round gets when one site floods the federation
	@$(VENV)/python -m bench.hostile --json docs/results/hostile.json

sbom: setup ## what is installed, with versions and licences, as CycloneDX JSON: build/sbom.json
	@mkdir -p build
	@$(VENV)/python -m tools.sbom > build/sbom.json
	@echo "[sbom] build/sbom.json"

dependencies: setup ## what is installed against constraints.txt, its own checksums, and licences; without the network
	@$(VENV)/python -m tools.dependencies

# What may lose or double an update stands in these two packages.
.PHONY: coverage-gate
coverage-gate:
	@printf '[coverage] lines of shared/ and coordinator/, at least 90 %%: '
	@$(VENV)/coverage report --include='shared/*,coordinator/*' --fail-under=90 --format=total

bench: setup ## 100 MB over a 4 Mbit/s link that is cut every minute, beside the ideal (four minutes): make bench ARGS="--mbit 30"
	@$(VENV)/python -m bench.goodput $(ARGS) 2> .make/bench.log

clean: ## remove caches, reports and demonstration runs; the virtual environment stays
	rm -rf .make .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.* build dist demo-run*
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
