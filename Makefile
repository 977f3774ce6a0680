# make demo   the whole line on this machine: prompts to a served pairing, 12 to 15 minutes on two cores with AVX-512
# make test   lint, types, layers and the tests that need no GPU
# make test-all   the same with the slow ones: floods, long kill series
# make audit  what the locked packages are (dist/sbom.json) and which of them have known weaknesses
# All set up what they need in .venv; a second run installs nothing.

VENV ?= .venv
PY := $(VENV)/bin/python
SYSTEM_TESTS ?= tests/security tests/learning tests/vllm tests/ray tests/serve tests/fault tests/overload
CHOSEN ?= not gpu and not slow
# A clean installation compiles what it imports, once, whatever the environment says: vLLM takes twice as long without.
QUIET := PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: setup demo test test-all reliability unit component lint gpu-test audit clean

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
	$(QUIET) OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto -m "$(CHOSEN)" tests/unit

# Whole engines and processes over tiny networks, without Ray and vLLM.
component: setup
	$(QUIET) OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto -m "$(CHOSEN)" tests/component

# One after another, each in a process of its own: they start engines and clusters that fill the machine.
test: lint unit component
	@set -e; for suite in $(SYSTEM_TESTS); do \
	    echo "== $$suite"; $(QUIET) $(PY) -m pytest -q -m "$(CHOSEN)" $$suite; \
	done

test-all:
	@$(MAKE) test CHOSEN="not gpu"
	$(PY) -m tests.fault.report --check

# Writes docs/reliability.md, and its raw figures, from what the fault tests last measured.
reliability:
	$(PY) -m tests.fault.report

gpu-test:
	$(PY) -m pytest -q -m gpu tests/gpu

# In an environment of its own, for its tools are no part of what is audited.
audit:
	@test -x build/audit/bin/pip-audit || (python3 -m venv build/audit && \
	    build/audit/bin/pip install -q pip-audit==2.10.1 cyclonedx-bom==7.5.0)
	@mkdir -p dist
	build/audit/bin/cyclonedx-py requirements requirements/cpu.lock --output-reproducible -o dist/sbom.json
	build/audit/bin/pip-audit --strict --disable-pip --require-hashes -r requirements/cpu.lock

clean:
	rm -rf .unmask build dist *.egg-info
