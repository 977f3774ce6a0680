# make demo   the whole line on this machine: prompts to a served pairing, about 15 minutes on two cores
# make test   lint, types, layers and all tests that need no GPU
# Both set up what they need in .venv; a second run installs nothing.

VENV ?= .venv
PY := $(VENV)/bin/python
TESTS ?= tests/unit tests/vllm tests/ray tests/serve
# One thread a process: the tests run several processes on few cores.
QUIET := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: setup demo test unit lint gpu-test clean

setup:
	@requirements/install.sh $(VENV)

demo: setup
	$(QUIET) $(PY) -m pipelines.run recipes/demo.yaml

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check
	$(VENV)/bin/lint-imports

unit: setup
	$(QUIET) $(PY) -m pytest -q tests/unit

test: lint
	$(QUIET) $(PY) -m pytest -q -m "not gpu" $(TESTS)

gpu-test:
	$(PY) -m pytest -q -m gpu tests/gpu

clean:
	rm -rf .unmask build dist *.egg-info
