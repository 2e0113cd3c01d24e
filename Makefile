# make demo     three questions about real pictures, answered by the model in spaces_demo/pocket
# make test     the whole suite
# Both create .venv first; a second call installs nothing. Needs Python 3.11 or newer: make PYTHON=python3.12 demo

PYTHON ?= python3
PACKAGES := modeling_longllava processing trainers evaluation cli
BIN := .venv/bin
EXAMPLES := spaces_demo/examples
# Two test processes of one thread each are faster than one of two: the models are tiny.
PYTEST := -m pytest -n 2
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-oldest quality format clean

demo: .venv/core
	$(BIN)/longllava chat $(EXAMPLES)/picture_*.png -q "Which digit has the red frame?"
	$(BIN)/longllava chat $(EXAMPLES)/video.mp4 -q "Which digits come first and last?"
	$(BIN)/longllava chat $(EXAMPLES)/sheet.png --tiles 12 -q "Which digit is on the sheet?"

test: .venv/test
	$(BIN)/python $(PYTEST)

test-oldest: .venv-oldest/test
	.venv-oldest/bin/python $(PYTEST)

quality: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy reads folders, not the mapping of names in setup.cfg: give it the folders under their installed names.
	@mkdir -p .venv/types/longllava
	@for name in $(PACKAGES); do ln -sfn ../../../$$name .venv/types/longllava/$$name; done
	MYPYPATH=.venv/types $(BIN)/mypy $(PACKAGES:%=-p longllava.%)

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/core: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/test: .venv/core
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

.venv-oldest/test: setup.cfg pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q --disable-pip-version-check -c constraints-oldest.txt -e '.[test]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
