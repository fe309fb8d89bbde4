# make demo and make test need python3 and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
HOSTS ?= .venv-hosts
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test test-integrations lint bench test-slow test-gpu bench-gpu plots study recovery compare aot snapshot clean

demo: $(READY)
	@echo "== demo: train MP and TopK SAEs on the embedded model and compare them"
	@$(BIN)/python -m mpsae demo

test: $(READY)
	@echo "== tests and doctests"
	@$(BIN)/python -m pytest

test-integrations: $(HOSTS)/ready
	@echo "== other packages with this encoder, against themselves"
	@$(HOSTS)/bin/python -m pytest tests/integrations tests/test_peer_loops.py \
		tests/test_saelens_layout.py

test-slow: $(READY)
	@echo "== slow tests: every kernel for every target, twenty kills, long runs, four processes"
	@$(BIN)/python -m pytest -m slow

# no environment is made: the machine's python3 has to have torch, triton, numpy and pytest
test-gpu:
	@echo "== Triton kernels on the GPU"
	@$(PYTHON) -m pytest -m gpu tests/test_triton_kernels.py tests/test_triton_gpu.py \
		tests/test_triton_backward.py tests/test_triton_decode.py

bench: $(READY)
	@echo "== every shape against the naive loop, other packages and the price of TopK"
	@$(BIN)/python bench/suite.py

bench-gpu:
	@echo "== every shape on the GPU, then its kernels one by one"
	@$(PYTHON) bench/suite.py --device cuda
	@$(PYTHON) bench/gpu.py
	@$(PYTHON) bench/gpu_backward.py

# the results files of one machine, measured by bench/sweep.py and bench/tradeoff.py
plots: $(READY)
	@echo "== the README's pictures from bench/results"
	@$(BIN)/python bench/plot.py

study: $(READY)
	@echo "== every variant of the studies on the embedded model, half an hour and more"
	@$(BIN)/python bench/study.py
	@$(BIN)/python bench/study_plot.py

recovery: $(READY)
	@echo "== which SAEs recover the features that synthetic data are made of"
	@$(BIN)/python bench/recovery.py
	@$(BIN)/python bench/penalty.py
	@$(BIN)/python bench/tree.py

compare: $(READY)
	@echo "== MP and its rivals at equal L0, three seeds: reconstruction beside interpretability"
	@$(BIN)/python bench/compare.py

aot: $(READY)
	@echo "== Triton kernels compiled ahead of time: registers, spills, shared memory"
	@$(BIN)/python bench/aot.py --check

snapshot: $(READY)
	@echo "== counts of work that the tests compare with, written anew: tests/snapshots"
	@$(BIN)/python -m pytest --write-snapshot tests/test_work.py

lint: $(READY)
	@echo "== ruff and mypy"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# torch comes first and alone, so that the build it brings satisfies everything after it
define install
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt $(2) setuptools
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation $(3) -e .
	@touch $(1)/ready
endef

$(READY): requirements.txt setup.py pyproject.toml $(wildcard kernels/csrc/*)
	@echo "== environment in $(VENV): installing the pinned packages (once)"
	$(call install,$(VENV))

$(HOSTS)/ready: requirements.txt requirements-hosts.txt setup.py pyproject.toml $(wildcard kernels/csrc/*)
	@echo "== environment in $(HOSTS): installing the hosts too (once)"
	$(call install,$(HOSTS),-r requirements-hosts.txt,overcomplete==0.3.0 dictionary-learning==0.1.0 sae-bench==0.6.0)

clean:
	rm -rf $(VENV) $(HOSTS) build dist runs *.egg-info
