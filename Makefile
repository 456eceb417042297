# Every target works as the first command on a fresh clone: the environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
AUDIO ?= ../shared/audio/train
THREADS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.semanticodec

.PHONY: demo test parity check bench bench-quality bench-speed readme train venv clean

demo: $(STAMP)  ## encode and decode a shipped recording; results in demo_out/
	$(BIN)/semanticodec demo --out demo_out

test: $(STAMP)  ## run the tests in two processes (ARGS="-k wire" and the like are passed on)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

parity: $(STAMP)  ## compare with recordings of the published code: tables here, in benchmarks/results and the README (half an hour, 10 GB)
	$(BIN)/python -m pytest -p no:xdist -m parity --timeout 3600 --keep=benchmarks/results $(ARGS)
	$(BIN)/python -m benchmarks.readme

check: $(STAMP)  ## lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## decode speed against this machine's matrix multiplication
	$(BIN)/python -m benchmarks.speed --threads $(THREADS) $(ARGS)

bench-quality: $(STAMP)  ## mini and the classical codecs on ../shared/audio, into benchmarks/results and the README
	$(BIN)/python -m benchmarks.quality $(ARGS)
	$(BIN)/python -m benchmarks.readme

bench-speed: $(STAMP)  ## every speed goal as a ratio, where the time goes, and what entropy coding saves, from one run
	$(BIN)/python -m benchmarks.ratios --threads $(THREADS) $(ARGS)
	$(BIN)/python -m benchmarks.entropy --threads $(THREADS) $(filter --write,$(ARGS))

readme: $(STAMP)  ## write the README's tables from benchmarks/results
	$(BIN)/python -m benchmarks.readme

train: $(STAMP)  ## train mini from the recordings in AUDIO, all stages, resumable
	$(BIN)/python -m semanticodec.training all --audio $(AUDIO) $(ARGS)

venv: $(STAMP)

clean:  ## remove what the other targets made
	rm -rf $(VENV) demo_out build semanticodec.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (PyTorch is large: this takes a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
