# `make demo` and `make test` do all the set-up they need by themselves, and repeat it only when something changed.
# What is missing on the machine is named by scripts/toolchain, with the command that installs it.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
SHELL := /bin/sh

VENV := .venv
BIN := $(VENV)/bin
# Everything the compiled module is made from. Python files are not in it: the package is installed in place.
SOURCES := Cargo.toml Cargo.lock build.rs $(shell find src guests crates -type f 2>/dev/null)

export PYTHON
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Where cargo lives if its folder is not on PATH; and the interpreter that PyO3 builds for.
export PATH := $(PATH):$(if $(CARGO_HOME),$(CARGO_HOME),$(HOME)/.cargo)/bin
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python

LIBUNICORN = $$($(BIN)/python -c 'import vmitap; print(vmitap.find_libunicorn())')

.PHONY: help demo test lint format bench bench-table bench-parts fuzz soak miri valgrind wheel xen-lab clean

help: ## this list
	@echo "vmitap: tap a running virtual machine without the machine noticing"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

demo: $(VENV)/.built ## boot a small guest, tap it, and see that it noticed nothing
	@$(BIN)/vmitap demo $(ARGS)

test: $(VENV)/.built $(VENV)/.dev ## every test, Rust and Python
	@echo "==> Rust tests"
	@VMITAP_LIBUNICORN=$(LIBUNICORN) cargo test --quiet --workspace --features emu,mock
	@echo "==> Python tests (the stub's and the README's examples included)"
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.built $(VENV)/.dev ## formatting, lints, types, and the stub against the compiled module
	@scripts/toolchain lint
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets --all-features -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	MYPYPATH=python $(BIN)/python -m mypy.stubtest vmitap

format: $(VENV)/.dev ## write the formatting that lint asks for
	cargo fmt --all
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# One after the other, also with -j: each would slow the other down. ARGS are the table's.
# PEERS=python with what is compared: python -m venv peers && peers/bin/pip install frida qiling python-ptrace
bench: ## one table: a hit here, in plain unicorn scripts, in gdb, and in peers (PEERS=peers/bin/python); then the parts
	@$(MAKE) bench-table
	@$(MAKE) bench-parts ARGS=

bench-table: $(VENV)/.built
	@$(BIN)/python benches/python/bench_table.py $(if $(PEERS),--peers $(PEERS)) $(ARGS)

bench-parts: $(VENV)/.built $(VENV)/.dev ## the benchmarks of the parts: lookups, books, the dance, insertions, captures, handlers
	@VMITAP_LIBUNICORN=$(LIBUNICORN) cargo bench --features mock --bench '*' $(ARGS)
	@$(BIN)/python benches/python/bench_dance.py
	@$(BIN)/python benches/python/bench_insertion.py
	@$(BIN)/python benches/python/bench_capture.py
	@$(BIN)/python benches/python/bench_dispatch.py

fuzz: ## hostile input for what reads it, for SECONDS (60) each
	@scripts/fuzz $(or $(SECONDS),60)

soak: $(VENV)/.built ## random sessions for SECONDS (120), watched for what grows
	@MALLOC_ARENA_MAX=1 $(BIN)/python tests/soak/soak.py --seconds $(or $(SECONDS),120)

miri: ## the event ring between two threads, under Miri (rustup toolchain install nightly --component miri)
	@MIRIFLAGS='-Zmiri-disable-isolation -Zmiri-many-seeds=0..4' cargo +nightly miri test --target-dir target/miri \
		--features emu,mock --test rust -- between_two_threads

valgrind: ## the Xen driver's calls of C, against the stand-in, under memcheck
	@CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='valgrind -q --error-exitcode=9' \
		cargo test --quiet --features emu,mock --test rust -- xen:: --test-threads=1

wheel: $(VENV)/.dev ## the wheel, in dist/, with its size and its libraries checked
	@rm -rf dist
	@$(BIN)/maturin build --release --out dist
	@VMITAP_WHEEL=$$(ls dist/*.whl) $(BIN)/python -m pytest -q tests/python/test_package.py -k wheel

# XEN=4.17|4.20|all, VCPUS=n, FILTER=pytest's -k, LONG=1, COVERAGE=1, ARGS=further options (docs/xen-lab.md).
xen-lab: COVERED := $(if $(COVERAGE),target/coverage)
xen-lab: $(VENV)/.dev ## the tests on real Xen, in an emulated machine
	@rm -rf target/xen-lab
	@$(if $(COVERAGE),RUSTFLAGS='-C instrument-coverage' LLVM_PROFILE_FILE=/dev/null CARGO_TARGET_DIR=$(COVERED)) $(BIN)/maturin build --release --quiet --out target/xen-lab
	@PYTHONPATH=tests/xen $(BIN)/python -m lab --wheel target/xen-lab/*.whl --xen '$(or $(XEN),all)' --vcpus '$(or $(VCPUS),2)' --filter '$(FILTER)' $(if $(LONG),--long) $(if $(COVERAGE),--coverage $(COVERED)/release/libvmitap.so) $(ARGS)

clean: ## remove everything that make has made
	rm -rf $(VENV) dist target .pytest_cache .mypy_cache .ruff_cache python/vmitap/*.so
	find python tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@python=$$(scripts/toolchain python) && echo "==> virtual environment in $(VENV), from $$python" && { "$$python" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; }

# One stamp for each group of packages. pip learned --group in 25.1.
$(VENV)/.build: pyproject.toml | $(BIN)/python
	@echo "==> build tools"
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --group build
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.build
	@echo "==> test and lint tools"
	@$(BIN)/python -m pip install --quiet --group dev
	@touch $@

$(VENV)/.built: $(SOURCES) pyproject.toml $(VENV)/.build
	@scripts/toolchain cc >/dev/null && scripts/toolchain cargo >/dev/null
	@echo "==> compiling vmitap (the first time takes a minute or two)"
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin develop --release --quiet
	@touch $@
