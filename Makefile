# make demo     three questions about real pictures, answered by the model in spaces_demo/pocket
# make test     the whole suite
# make gpu      on a machine with a GPU: its tests and all measurements, into results/<date>-<gpu>
# Both create .venv first; a second call installs nothing. Needs Python 3.11 or newer: make PYTHON=python3.12 demo

PYTHON ?= python3
PACKAGES := modeling_longllava processing trainers evaluation cli
BIN := .venv/bin
EXAMPLES := spaces_demo/examples
# Two test processes of one thread each are faster than one of two: the models are tiny.
PYTEST := -m pytest -n 2
export OMP_NUM_THREADS ?= 1

# A GPU machine may have its own Python with torch, and no network: nothing is installed for its measurements.
GPU_PYTHON ?= $(or $(wildcard $(BIN)/python),$(PYTHON))
GPU_NAME = $(shell nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr -c '[:alnum:]\n' '-')
RESULTS = results/$(shell date +%F)-$(GPU_NAME)
ON_GPU = env -u OMP_NUM_THREADS PYTHONPATH=$(CURDIR)/build/gpu $(GPU_PYTHON) -m
MEASURE = $(ON_GPU) longllava.evaluation.efficiency

.PHONY: demo test test-oldest quality format clean gpu gpu-packages gpu-test gpu-scan gpu-prefill gpu-images \
	gpu-decode gpu-session gpu-pictures

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

# Each part is a process of its own and keeps what it has written, whatever becomes of the others.
gpu:
	$(MAKE) --keep-going gpu-test gpu-scan gpu-prefill gpu-decode gpu-session gpu-pictures gpu-images RESULTS=$(RESULTS)

gpu-packages:
	@mkdir -p build/gpu/longllava
	@for name in $(PACKAGES); do ln -sfn ../../../$$name build/gpu/longllava/$$name; done

gpu-test: gpu-packages
	$(ON_GPU) pytest tests/modeling_longllava tests/evaluation/test_efficiency.py

gpu-scan: gpu-packages
	$(MEASURE) scan --device cuda --limit 5 --output $(RESULTS)

gpu-prefill: gpu-packages
	$(MEASURE) prefill --device cuda --config 9b --limit 15 --output $(RESULTS)

gpu-decode: gpu-packages
	$(MEASURE) decode --device cuda --config 9b --output $(RESULTS)

gpu-session: gpu-packages
	$(MEASURE) session --device cuda --config pocket --pictures 1000 --questions 100 --output $(RESULTS)

gpu-pictures: gpu-packages
	$(MEASURE) pictures --count 1000 --output $(RESULTS)

gpu-images: gpu-packages
	$(MEASURE) images --device cuda --config 9b --counts 10,100,1000,10000 --tail 20000 --budget-gb 80 \
		--output $(RESULTS)

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
