# make demo   train on the digits and draw from the model as an RNN (3 to 6 minutes)
# make test   check the code and run all the tests (10 to 18 minutes)
# make check  ruff and pyright alone
# make clean  remove the virtual environment and what the demo wrote

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check clean

demo: $(READY)
	$(BIN)/python examples/digits_demo.py

test: check
	$(BIN)/python -m pytest -q -n auto

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --level error

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hf,dev]'
	touch $@

clean:
	rm -rf $(VENV) demo
