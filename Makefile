# Everything is installed into .venv, nothing outside this folder.
PYTHON ?= python3
# The CPU build of torch: make repro TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BASE ?= main
# Processes that run tests: one more than two cores, since tests wait for processes that they start.
JOBS ?= 3
UPGRADE ?=
# A file's tests share what they make. Files begin in the order of tests/conftest.py.
SIDE_BY_SIDE = pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

BIN := $(CURDIR)/.venv/bin
# Without bytecode: Python compiles a module when it first imports it, and most it never does.
PIP = $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check
# Packages without a wheel are built with the lock's setuptools.
HASHED = $(PIP) --no-deps --require-hashes --no-build-isolation --use-pep517
TORCH_FROM = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
READY := .venv/ready
# dvc.yaml calls `python`, which must be the environment's.
export PATH := $(BIN):$(PATH)

.PHONY: help env repro test quick test-browser test-serving test-trackers families lock gguf lint fix figures compare gate noise harness test-harness experiments chaos mutants
help:  ## Show this list.
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

env: $(READY)  ## Make the environment in .venv.

$(READY): requirements.lock requirements-torch.lock requirements-default.lock requirements-kernels.lock
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make env PYTHON=python3.11")'
	@echo "Making the environment in .venv (a few minutes, once)"
	@$(PYTHON) -m venv .venv
	@awk '/^[a-z]/ {on = /^setuptools==/} on' requirements.lock | $(PIP) --require-hashes -r /dev/stdin
	@$(HASHED) -r requirements.lock -r requirements-default.lock -r requirements-kernels.lock
	@$(PIP) $(TORCH_FROM) -r requirements-torch.lock
	@$(BIN)/python -m tools.offline_plots
	@touch $@
	@find $^ -newer $@ -exec touch -r {} $@ \;  # if the clock was set back

repro: $(READY)  ## Run the stale stages of the pipeline.
	@python -m tools.recover && dvc repro

test: $(READY)  ## Run the tests.
	@$(SIDE_BY_SIDE)

quick: $(READY)  ## Run the tests that start no stage, in a minute or two.
	@$(SIDE_BY_SIDE) -m 'not slow and not gpu'

test-browser: $(READY)  ## Open the report and the plots in Chromium without a network.
	@pytest tests/browser/check_report.py

.uv/bin/uv:
	@$(PYTHON) -m venv .uv
	@.uv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9

lock: .uv/bin/uv  ## Renew requirements*.lock: make lock UPGRADE="dvc datasets", or UPGRADE=all
	@$(PYTHON) -m tools.lock --upgrade $(UPGRADE)

# Two versions of transformers, each in its own environment.
.serving/%/ready: requirements-torch.lock
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_FROM) -r $< "transformers$(if $(filter 5,$*),[serving])==$*.*"
	@touch $@

test-serving: $(READY) .serving/4.57/ready .serving/5/ready .gguf/ready  ## Load releases in transformers 4.57 and 5, serve one, convert one to GGUF.
	@pytest tests/serving/check_release.py

# The project's packages, with the trackers on top.
.trackers/ready: requirements.lock $(READY)
	@$(BIN)/python -m venv --clear $(@D)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check "wandb>=0.31" "mlflow-skinny>=3.17" sqlalchemy alembic
	@touch $@

test-trackers: .trackers/ready  ## Train with Weights & Biases and MLflow, in an environment of their own.
	@.trackers/bin/python -m pytest -W ignore::DeprecationWarning tests/test_trackers.py

.gguf/ready: requirements-gguf.lock $(READY)
	@rm -rf $(@D)
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python --require-hashes -d $(@D) -r $<
	@tar -xzf $(@D)/llama_cpp_python-*.tar.gz -C $(@D) --strip-components=3 --wildcards '*/llama.cpp/convert_hf_to_gguf.py' '*/llama.cpp/conversion' '*/llama.cpp/gguf-py'
	@$(BIN)/python -m zipfile -e $(@D)/sentencepiece-*.whl $(@D)
	@rm $(@D)/*.tar.gz $(@D)/*.whl
	@touch $@

GGUF = models/release.gguf
gguf: .gguf/ready  ## Convert models/release to models/release.gguf, and compare the two.
	@python .gguf/convert_hf_to_gguf.py models/release --outtype auto --outfile $(GGUF).partial
	@python -m tools.check_gguf $(GGUF).partial
	@mv $(GGUF).partial $(GGUF)

chaos: $(READY)  ## Kill the pipeline hundreds of times and feed it hostile files (an hour); make chaos PART=writes runs a part
	@python -m tests.chaos $(PART)

# With the project's packages, and mutmut in front of them.
.mutmut/ready: requirements.lock $(READY)
	@$(BIN)/python -m venv --clear .mutmut/env
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(.mutmut/env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	@.mutmut/env/bin/python -m pip install --quiet --disable-pip-version-check mutmut==3.8.1
	@touch $@

mutants: .mutmut/ready  ## Change six modules and see tests fail, an hour, or make mutants NAMES="gate scoring"; writes a result file
	@.mutmut/env/bin/python -m tests.mutants $(NAMES)

families: $(READY)  ## Try tiny models of all families, an hour, or make families NAMES="gemma3 granite"; writes docs/models.md
	@PYTHONPATH=tests python -m tests.families $(NAMES)

lint: $(READY)  ## Check style, format and types.
	@ruff check .
	@ruff format --check .
	@mypy

fix: $(READY)  ## Fix style and format.
	@ruff check --fix .
	@ruff format .

figures: $(READY)  ## Insert the figures of metrics/ and benchmarks/results/ into README and docs/.
	@python -m benchmarks.figures

compare: $(READY)  ## Compare metrics and parameters with another revision: make compare BASE=main
	@python -m tools.compare --base $(BASE)

gate: $(READY)  ## Fail if quality fell beyond the limits in gate.yaml: make gate BASE=origin/main
	@python -m tools.gate --base $(BASE)

noise: $(READY)  ## Repeat the default with three other seeds and record the spread.
	@python -m tools.noise --seeds 1 2 3

.harness/ready: requirements-harness.lock $(READY)
	@$(HASHED) --target $(@D) --upgrade -r $<
	@touch $@

harness: .harness/ready  ## Run tasks of lm-evaluation-harness: make harness TASKS="hellaswag arc_easy"
	@PYTHONPATH=$(CURDIR)/.harness python -m tools.harness --tasks $(TASKS)

test-harness: .harness/ready  ## Run a task of lm-evaluation-harness on a tiny model, without a network.
	@PYTHONPATH=$(CURDIR)/.harness pytest tests/harness/check_harness.py

experiments: $(READY)  ## Show the experiments with the important columns.
	@dvc exp show --only-changed --drop '^(?!(Experiment|\w+_after|retention_change_percent|merge_change_percent|train_minutes|v?ram_gb|seed|(lora|train|quantize|merge|model|dataset|prepare)\..*)$$)'
