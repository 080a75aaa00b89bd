# `make repro` runs the main job, `make test` the tests; both set the environment up first.
PYTHON ?= python3.11
JOBS ?= 2
BENCH ?= train_step
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)

# Nothing is reported to anybody, unless the user's own environment says so.
export DVC_NO_ANALYTICS ?= 1
export MLFLOW_DISABLE_TELEMETRY ?= true
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export DO_NOT_TRACK ?= 1
export GX_ANALYTICS_ENABLED ?= false
export RAY_USAGE_STATS_ENABLED ?= 0
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: help setup repro test lint bench ui services clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(VENV)/.installed  ## make the virtual environment from requirements.lock

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

repro: setup  ## run the pipeline: everything that is out of date, in order
	dvc repro

test: setup  ## run the tests
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --durations 30

lint: setup  ## check style
	$(BIN)/ruff check src flows tests
	$(BIN)/ruff format --check src flows tests

bench: setup  ## measure: BENCH=train_step by default; or flism, validate, retrieval ...
	$(BIN)/python benchmarks/$(BENCH).py

ui: setup  ## show runs and models at http://127.0.0.1:5000
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

services: setup  ## MLflow and Prefect servers on loopback, until Ctrl-C
	fast-goal services

# .fast_goal/services stays: the runs and registered models of `make services`
clean:  ## remove what the pipeline made, but not DVC's cache
	rm -rf $(filter-out .fast_goal/services,$(wildcard .fast_goal/*)) data/records data/datasets data/flism data/validation \
	  data/publish models/base models/intermediate models/finetune models/reports models/register
