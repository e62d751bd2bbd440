# The interface of this repository: demo, test, check, fuzz, proto, bench.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := .venv-proto
FLOOR_VENV := .venv-floor
BENCH ?= step
FUZZ_SECONDS ?= 600

.PHONY: demo test check floor fuzz proto bench install wheel clean

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
	$(MAKE) floor
	sh tests/wheel/run.sh $(PYTHON) $(BIN)

floor: $(FLOOR_VENV)/.installed
	PEER_PYTHON=$(CURDIR)/$(BIN)/python $(FLOOR_VENV)/bin/python -m pytest tests/floor tests/unit/envelope \
	    tests/unit/identity tests/unit/runtime tests/contract/test_wire_contract.py

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

# Its own packages come first, everything else (torch above all) from the environment it is laid over.
$(FLOOR_VENV)/.installed: constraints-floor.txt tests/floor/layer.py $(VENV)/.installed
	$(PYTHON) -m venv $(FLOOR_VENV)
	$(FLOOR_VENV)/bin/pip install --quiet --requirement constraints-floor.txt
	$(FLOOR_VENV)/bin/python tests/floor/layer.py $(VENV)
	touch $@

# The generator is older than the runtime on purpose, and cannot share its environment.
$(PROTO_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install --quiet grpcio-tools==1.78.0 mypy-protobuf==5.0.0
	touch $@

clean:
	rm -rf $(VENV) $(PROTO_VENV) $(FLOOR_VENV) .build dist var
