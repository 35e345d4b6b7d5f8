# `make help` lists the commands. All of them work in .venv, filled from the pinned versions in requirements/.

PYTHON     ?= python3
UV_VERSION := 0.13.9
WORKDIR    := runs/quickstart
PY         := .venv/bin/python
.DEFAULT_GOAL := help

# 3.11 has its own pins (jax 0.11 and later need 3.12); VERSION is empty where $(PYTHON) does not run.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
LOCK    := requirements/$(if $(filter 3.11.%,$(VERSION)),py311,py312)

# What .venv holds is remembered by empty files in it, named after Python, this directory and the content of the lock:
# a second `make` does nothing, another Python or a moved checkout makes .venv anew, another lock installs again.
HERE  := $(VERSION)-$(shell echo "$(CURDIR)" | cksum | cut -d' ' -f1)
stamp = .venv/.$(1)-$(HERE)-$(shell cat $(2) 2>/dev/null | cksum | cut -d' ' -f1)
VENV  := .venv/.python-$(HERE)
CORE  := $(call stamp,core,$(LOCK).txt setup.py)
TEST  := $(call stamp,test,$(LOCK)-test.txt)

# torch, the reference of tests and benchmarks, should be a CPU build: from pip's own links where some are set, else from
# PyTorch's index.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
TORCH := $(if $(UV_FIND_LINKS),,--torch-backend cpu)

# $(call install,name,lock,flags of uv): install a lock, by uv, or by pip where there is no uv
define install
@echo "installing $(2) into .venv (Python $(VERSION))"
@rm -f .venv/.$(1)-*
@if [ -x .venv/bin/uv ]; then .venv/bin/uv pip install -q --python $(PY) --compile-bytecode $(3) -r $(2); \
 else $(PY) -m pip install -q -r $(2); fi
endef

.PHONY: help quickstart test lint soak bench bench-decode parity clients modalities omni lock clean

help:
	@echo "make quickstart   train a small model on the CPU, evaluate it, ask it a question, write a report; run again to resume"
	@echo "make test         lint, then all tests            (make test ARGS='-k packing')"
	@echo "make lint         ruff"
	@echo "make soak         every test of exactness, the slow ones, too: docs/results/exactness.md; run again to go on"
	@echo "make bench        training speed beside PyTorch   (Python 3.11 only)"
	@echo "make bench-decode decoding speed beside Hugging Face's, docs/results/decode.md   (Python 3.11 only)"
	@echo "make parity       our layers beside Hugging Face's: docs/results/parity.md   (Python 3.11 only)"
	@echo "make clients      openai's Python and node clients and lm-eval at a live server: docs/results/clients.md; needs a network"
	@echo "make modalities   every task of docs/results/modalities.md, which is written anew: hours; run again to go on"
	@echo "make omni         four modalities in one model beside each alone: docs/results/omni.md; run again to go on"
	@echo "make lock         write requirements/ anew from setup.py   (make lock ARGS=--upgrade takes newer versions)"
	@echo "make clean        remove .venv and caches; runs/ stays"
	@echo "Every one takes PYTHON=python3.12 or the like; 3.11 is the oldest that works."

quickstart bench bench-decode modalities omni: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1# huge pages: faster on Linux, ignored elsewhere

quickstart: $(CORE)
	$(PY) -m gpt4v_jax.train --config configs/quickstart.py --workdir $(WORKDIR)
	$(PY) -m gpt4v_jax.evaluate --workdir $(WORKDIR)
	$(PY) -m gpt4v_jax.generate --workdir $(WORKDIR) --record test:0
	$(PY) -m gpt4v_jax.report --workdir $(WORKDIR)

test: lint
	$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(TEST)
	$(PY) -m ruff check .

# What a test has shown stands in SHOWN, and is not run again: `rm $(SHOWN)` starts anew.
SHOWN := runs/exactness.jsonl
soak: $(TEST)
	@mkdir -p $(dir $(SHOWN))
	SHOWN=$(SHOWN) $(PY) -m pytest --soak -v -n 2 --dist loadfile $(ARGS) tests/test_exactness.py tests/test_devices.py tests/test_processes.py \
	  tests/training/test_step.py tests/training/test_objectives.py tests/training/test_contrastive.py tests/training/test_checkpoint.py \
	  tests/training/test_optim.py tests/interop/test_parity.py tests/experiments \
	  tests/model/test_gpt4v.py tests/model/test_fusion.py tests/generate/test_decode.py \
	  tests/generate/test_beam.py tests/generate/test_speculative.py tests/serve/test_engine.py
	$(PY) -m benchmarks.exactness --shown $(SHOWN) --out docs/results

modalities omni: $(TEST)
	$(PY) -m benchmarks.$@ --train

clients: $(TEST)
	$(PY) -m benchmarks.clients --out docs/results

ifneq ($(filter 3.11.%,$(VERSION)),)
bench: $(TEST)
	$(PY) -m benchmarks.train_step $(ARGS)

bench-decode: $(TEST)
	$(PY) -m benchmarks.decode --out docs/results $(ARGS)

parity: $(TEST)
	$(PY) -m benchmarks.parity --out docs/results
else
bench bench-decode parity:
	@echo "make $@ needs Python 3.11, for which there is a pinned torch; '$(PYTHON)' $(if $(VERSION),is $(VERSION),does not run)."
	@echo "Try: make $@ PYTHON=python3.11"; exit 1
endif

$(VENV):
	@case "$(VERSION)" in \
	"") echo "'$(PYTHON)' does not run. Name a Python (3.11 or newer): make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1;; \
	2.*|3.[0-9].*|3.10.*) echo "'$(PYTHON)' is Python $(VERSION), but 3.11 is the oldest that works:" \
	  "make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1;; esac
	@echo "making .venv (Python $(VERSION))"
	@$(PYTHON) -m venv --clear .venv
	@$(PY) -m pip install -qq --disable-pip-version-check uv==$(UV_VERSION) \
	  || echo "no uv $(UV_VERSION) to be had: pip installs instead, which takes a few minutes"
	@touch $@

$(CORE): | $(VENV)
	$(call install,core,$(LOCK).txt)
	@if [ -x .venv/bin/uv ]; then .venv/bin/uv pip install -q --python $(PY) --no-deps -e .; \
	 else $(PY) -m pip install -q --no-deps -e .; fi
	@touch $@

$(TEST): | $(CORE)
	$(call install,test,$(LOCK)-test.txt,$(TORCH))
	@touch $@

# Each list takes over the versions of the one before it, so that installing the second changes nothing of the first.
COMPILE = .venv/bin/uv pip compile -q setup.py --no-python-downloads --no-annotate --no-emit-index-url \
  --no-emit-find-links --custom-compile-command "make lock" $(ARGS)
lock: | $(VENV)
	$(COMPILE) --python-version 3.11 -o requirements/py311.txt
	sed -i.bak 's/^torch==[0-9.]*$$/&+cpu/' requirements/py311-test.txt  # uv keeps what it finds there
	$(COMPILE) --python-version 3.11 -o requirements/py311-test.txt --extra test -c requirements/py311.txt $(TORCH)
	sed -i.bak 's/+cpu$$//' requirements/py311-test.txt && rm requirements/py311-test.txt.bak
	$(COMPILE) --python-version 3.12 -o requirements/py312.txt
	$(COMPILE) --python-version 3.12 -o requirements/py312-test.txt --extra test -c requirements/py312.txt

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
