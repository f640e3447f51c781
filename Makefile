# `make demo`: watch masks evolve on real photographs. `make test`: all tests. Both set up .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
WORKERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)# of tests: one more than cores, for those that wait for a Slurm
RUN := $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help demo demo-beit demo-simmim reproduce-tiny test test-full test-upstream check lint types benchmark clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

# A stamp for each group, made again when its requirements change.
$(VENV)/.demo: requirements.txt requirements-demo.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is %s (set PYTHON=)" % sys.version.split()[0])'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-demo.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements-downstream.txt $(VENV)/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.upstream: requirements-upstream.txt $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-upstream.txt
	@touch $@

demo: $(VENV)/.demo  ## pre-train a small MAE with evolved masks on photographs (CPU, minutes)
	$(RUN) -m mae_evolved.main_pretrain --config demo --resume none --output_dir output/demo_mae

demo-beit: $(VENV)/.demo  ## train a small tokenizer, then a small BEiT with evolved masks on photographs (CPU, minutes)
	$(RUN) -m beit_evolved.train_tokenizer --config demo_tokenizer --resume none --output_dir output/demo_tokenizer
	$(RUN) -m beit_evolved.run_beit_pretraining --config demo --tokenizer output/demo_tokenizer --resume none --output_dir output/demo_beit

demo-simmim: $(VENV)/.demo  ## pre-train a small SimMIM with evolved masks on photographs (CPU, minutes)
	$(RUN) -m simmim_evolved.main_simmim --config demo --resume none --output_dir output/demo_simmim

reproduce-tiny: $(VENV)/.dev  ## Table 4 in the small: 19 runs from pre-training to the printed table (CPU, minutes)
	$(RUN) -m paper.reproduce --table 4 --scale tiny --local

test: $(VENV)/.dev  ## all tests, on all cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) --dist worksteal

test-full: $(VENV)/.dev  ## the long form of tests that train for a number (minutes each)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist worksteal -m full

test-upstream: $(VENV)/.upstream  ## tests against clones: UPSTREAM_MAE=PATH UPSTREAM_BEIT=PATH UPSTREAM_SIMMIM=PATH
	$(RUN) -m pytest -q tests/patches tests/downstream/test_weights.py

lint: $(VENV)/.dev  ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy
	$(BIN)/mypy

check: lint types test  ## everything CI runs

benchmark: $(VENV)/.dev  ## what a step and its mask cost on this machine, ViT-S; OFFICIAL="CLONES": beside the official models
	$(RUN) -m benchmarks.train_step --models small --repeats 3 $(if $(OFFICIAL),--official $(OFFICIAL))

clean:  ## remove the virtual environment and outputs
	rm -rf $(VENV) output
