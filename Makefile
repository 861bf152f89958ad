# make install   build .venv with everything the tests need (the other targets call it when needed)
# make test      run the tests, two files at a time
# make test-large  run those at real sizes: half an hour, 20 GB of memory, 60 GB of disk; and an hour of tools/soak.py
# make test-tpu  compile all rows of docs/tpu.md that are not there yet: minutes each, 6 GB of memory
# make demo      draw a corpus, train the nano model, score it: about a quarter of an hour on two CPU cores
# make backbones make the shipped nano backbones again, from nothing (an hour or two)
# make lint      ruff
PYTHON := $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install test test-large test-tpu demo backbones lint clean

install: $(STAMP)

# The stamp is younger than setup.py exactly when .venv holds what setup.py asks for.
$(STAMP): setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $(STAMP)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-large: $(STAMP)
	$(BIN)/python -m pytest -m large -s
	$(BIN)/python tools/soak.py --minutes 60

test-tpu: $(STAMP)
	$(BIN)/python tools/tpu_table.py

demo: $(STAMP)
	$(BIN)/alignvlm demo --out runs/demo

backbones: $(STAMP)
	$(BIN)/python tools/make_backbones.py

lint: $(STAMP)
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
