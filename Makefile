# The interface of this repository: demo, test, check, fuzz, proto, bench.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := .venv-proto
BENCH ?= step
FUZZ_SECONDS ?= 600

.PHONY: demo test check fuzz proto bench install wheel clean

demo: install
	$(BIN)/esper demo

test: install
	$(BIN)/python -m pytest

check: install $(PROTO_VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format -d --exit-code
	sh protos/breaking.sh $(BIN)/buf
	$(PROTO_VENV)/bin/python protos/generate.py --check
	sh tests/wheel/run.sh $(PYTHON) $(BIN)

proto: $(PROTO_VENV)/.installed install
	$(BIN)/buf format -w
	$(PROTO_VENV)/bin/python protos/generate.py

# Not part of test: a short fixed run of every target is.
fuzz: install
	PYTHONPATH=tests $(BIN)/python -m fuzz --seconds $(FUZZ_SECONDS)

bench: install
	$(BIN)/esper bench $(BENCH) --json

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The generator is older than the runtime on purpose, and cannot share its environment.
$(PROTO_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install --quiet grpcio-tools==1.78.0 mypy-protobuf==5.0.0
	touch $@

clean:
	rm -rf $(VENV) $(PROTO_VENV) .build dist var
