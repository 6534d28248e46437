# Everything a newcomer needs; CI calls the same targets. Only Python 3.10 or newer is assumed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo-output

.PHONY: demo test soak check bench bench-gpu model clean

demo: $(VENV)/.installed  ## segment the bundled shards with the bundled model, label, export and show them
	$(BIN)/clipseg-ray demo $(OUT)

test: $(VENV)/.installed-dev  ## all tests, two files of them at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: $(VENV)/.installed-dev  ## kills and storage faults of whole jobs as a table, and tests that take long
	$(BIN)/python -m tests.soak
	$(BIN)/python -m pytest -m soak

check: $(VENV)/.installed-dev  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev  ## transformers, Ray Data and ours side by side; hours at full size
	$(BIN)/python -m benchmarks.encode_once
	$(BIN)/python -m benchmarks.encoders
	$(BIN)/python -m benchmarks.embed_job
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.export
	$(BIN)/python -m benchmarks.search

bench-gpu: $(VENV)/.installed-dev  ## what share of this machine's card the segment actor uses; minutes
	$(BIN)/python -m benchmarks.gpu

model: $(VENV)/.installed  ## train and measure the bundled model again; about an hour on 2 cores
	$(BIN)/python -m pipeline.demo.train
	$(BIN)/python -m pipeline.demo.evaluate

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing clipseg-ray with PyTorch, Ray and Arrow into $(VENV): some minutes and 2 GB, once"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing clipseg-ray, and what tests and checks need, into $(VENV): some minutes and 3 GB, once"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
