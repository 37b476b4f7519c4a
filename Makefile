# What each command does is written in dev.py; `make` lists them.
#
#   make test ARGS="-k kron"          further arguments for the command
#   make test PYTHON=python3.13       the Python that .venv is built with
#   make test PIP_ARGS="..."          further arguments for pip install

PYTHON ?= python3
ARGS ?=
COMMANDS = test test-triton demo lint types format docs notebooks fuzz

.PHONY: help .venv clean $(COMMANDS)

help clean:
	@$(PYTHON) dev.py $@

.venv:
	@$(PYTHON) dev.py setup

# .venv is a step of its own, so that `make -j2 demo test` sets up once.
$(COMMANDS): .venv
	@$(PYTHON) dev.py $@ $(ARGS)
