# make run     train and score a DCGAN on real handwritten digits: pictures and a table in a few minutes
# make test    lint, types and every test except those that need a CUDA device (tests/gpu)
# make check   lint and types
# make bench   compare training with PyTorch's DCGAN tutorial here; writes docs/performance.md: an hour on 2 cores
# make ui      MLflow and Prefect with everything run so far, to look at in a browser, until Ctrl-C
# make up      Prefect, MLflow and a worker in the background, with everything in prefect.yaml deployed
# make down    stop them
#
# Another preset, other settings:  make run PRESET=mnist SET="train.steps=500 evaluate.protocols=[svm,knn]"
# Another Python (3.11 or later):  make run PYTHON=python3.12

PRESET = digits
SET =
PYTHON = python3
BIN = .venv/bin

# Everything that runs keeps its files in here and reports to nobody.
export DCGAN_HOME ?= $(CURDIR)/var
export PREFECT_HOME = $(DCGAN_HOME)/prefect
export PREFECT_SERVER_ANALYTICS_ENABLED = false
export PREFECT_FLOWS_HEARTBEAT_FREQUENCY = 30
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS = 180
export DO_NOT_TRACK = 1
export MLFLOW_DISABLE_TELEMETRY = true

.PHONY: help run test check bench ui up down

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# One short line per step, and the library's own messages.
run: export PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT = %(asctime)s %(levelname)-7s %(message)s
run: export PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT = %(asctime)s %(levelname)-7s %(task_run_name)s: %(message)s
run: export PREFECT_LOGGING_FORMATTERS_STANDARD_FORMAT = %(asctime)s %(levelname)-7s %(message)s
run: export PREFECT_LOGGING_EXTRA_LOGGERS = dcgan
run: export PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW = ignore
run: .venv/installed
	@mkdir -p "$(PREFECT_HOME)"
	@$(BIN)/python -m flows.train_eval $(PRESET) $(SET)

# One process per file of the slower suites and per folder of unit tests, three at a time: mostly they wait for servers
# to start or die. The longest first, so that none is left running alone at the end: file size is a rough guide.
test: check
	@{ echo 'tests/unit --ignore-glob=tests/unit/*/*'; printf '%s\n' tests/unit/[!_]*/ tests/faults/test_*.py; \
	  ls -S tests/integration/test_*.py; } | xargs -P 3 -I@ sh -c \
	  'found=$$($(BIN)/pytest -q @ 2>&1); code=$$?; printf "%s\n%s\n" "@" "$$found"; exit $$code'

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/installed
	@$(BIN)/python tests/benchmarks/performance.py

ui up: .venv/installed
	@$(BIN)/python infra/local.py $@

down:
	@if [ -x $(BIN)/python ]; then $(BIN)/python infra/local.py down; fi

# uv, because pip takes minutes to resolve what uv resolves in seconds. The constraints apply to builds, too. Compiled at
# once: where Python may not write bytecode, each of a run's ten processes would compile torch, MLflow and Ray for itself.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'error: Python 3.11 or later is needed: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo 'error: $(PYTHON) comes without venv; on Debian: apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	UV_HTTP_TIMEOUT=300 $(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt \
	  --build-constraint constraints.txt --compile-bytecode --editable '.[dev]'
	@touch $@
