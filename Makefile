# Two commands matter: `make demo` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SEEDS ?= 1
DATA ?=
MACHINE ?=
WORKERS ?= 2
TORCH ?= 2.10.0

THREADS ?= $(shell nproc)
SECONDS_PER_MODEL ?= 180
BENCH := tests/benchmarks
RESULTS := runs/benchmarks

.PHONY: help venv demo study distillation-study tables bench bench-rule bench-training \
	bench-profile bench-inference bench-inference-profile bench-hooks bench-roofline bench-peers \
	performance bench-teacher bench-distillation test test-slow test-torch test-cuda conformance check docs \
	reference readme

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## / - /'

venv: $(STAMP)  ## create or update .venv from constraints.txt

$(STAMP): constraints.txt setup.cfg pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,examples]'
	@touch $(STAMP)

demo: $(STAMP)  ## distill and quantize on real images; DATA=<folder> for the full set, SEEDS=3 to repeat
	$(BIN)/python examples/distill_and_quantize.py examples/recipes/distill_and_quantize.yaml \
		--seeds $(SEEDS) $(if $(DATA),--data "$(DATA)")

study: $(STAMP)  ## compare ways to quantize over 3 seeds; DATA=<folder> for the full set
	$(BIN)/python examples/quantization_study.py $(if $(DATA),--data "$(DATA)")

distillation-study: $(STAMP)  ## compare all ways to distill over 3 seeds; WORKERS=<cores>; says first how long
	$(BIN)/python examples/distillation_study.py --workers $(WORKERS)

tables: $(STAMP)  ## quantize the demo's students in every way; needs `make demo SEEDS=3`
	$(BIN)/python examples/post_training_study.py

# They run one after the other, however many jobs make was given: nothing else may be running.
bench: $(STAMP)  ## training steps, inference, hooks, the rule, the machine; half an hour, quiet machine
	$(MAKE) -j1 bench-roofline bench-rule bench-training bench-profile bench-inference \
		bench-inference-profile bench-hooks

bench-roofline: $(STAMP)  ## what the machine can do: bandwidth, peaks; what a step needs of both
	$(BIN)/python $(BENCH)/roofline.py --threads $(THREADS)

bench-rule: $(STAMP)  ## time layers with and without integers, beside what the rule chooses
	$(BIN)/python $(BENCH)/integer_rule.py --threads $(THREADS)

bench-training: $(STAMP)  ## time a quantization-aware training step beside the float32 step
	$(BIN)/python $(BENCH)/training_step.py --threads $(THREADS) \
		--seconds-per-model $(SECONDS_PER_MODEL) --chart $(RESULTS)/training_step.png

bench-profile: $(STAMP)  ## where the time of a training step goes
	$(BIN)/python $(BENCH)/step_profile.py --threads $(THREADS)

bench-inference: $(STAMP)  ## time the converted model by every route beside float32
	$(BIN)/python $(BENCH)/inference.py --threads $(THREADS) \
		--seconds-per-model $(SECONDS_PER_MODEL) --chart $(RESULTS)/inference.png

bench-inference-profile: $(STAMP)  ## where the time of inference goes
	$(BIN)/python $(BENCH)/inference_profile.py --threads $(THREADS)

bench-hooks: $(STAMP)  ## time hooks, checkpoints, long trainings and many layers
	$(BIN)/python $(BENCH)/hooks.py

bench-peers: $(STAMP)  ## the same for other libraries, in environments of their own (build/peers)
	$(BIN)/python $(BENCH)/peers/run.py --threads $(THREADS) --chart $(RESULTS)/peers.png

performance: $(STAMP)  ## put these figures into the docs; MACHINE=<short name of the processor>
	$(BIN)/python docs/update_performance.py $(if $(MACHINE),--machine "$(MACHINE)")

bench-teacher: $(STAMP)  ## speed, memory and distortion of the teacher's options
	$(BIN)/python tests/benchmarks/teacher_runtime.py

bench-distillation: $(STAMP)  ## time a distillation step from a cached teacher; wants a quiet machine
	$(BIN)/python tests/benchmarks/distillation_step.py

test: $(STAMP)  ## the quick test suite, under 8 minutes on 2 cores
	$(BIN)/python -m pytest -n 2

test-slow: $(STAMP)  ## the tests that build, install, kill and study; about four minutes on 2 cores
	$(BIN)/python -m pytest -n 2 -m slow --ignore tests/conformance/test_compilers.py tests

# Constraints are those of the newest torch; warnings are the older one's own.
test-torch: $(STAMP)  ## the quick suite with another torch, by default the oldest; TORCH=<version>
	test -x build/torch-$(TORCH)/bin/python || $(PYTHON) -m venv build/torch-$(TORCH)
	grep -v '^torch==' constraints.txt > build/torch-$(TORCH)/constraints.txt
	build/torch-$(TORCH)/bin/python -m pip install --quiet torch==$(TORCH)
	build/torch-$(TORCH)/bin/python -m pip install --quiet \
		--constraint build/torch-$(TORCH)/constraints.txt --editable '.[dev,examples]'
	build/torch-$(TORCH)/bin/python -m pytest -n 2 -o filterwarnings=default

test-cuda: $(STAMP)  ## the tests that need a GPU; install a CUDA build of torch first
	$(BIN)/python -m pytest -m "" tests/cuda

conformance: $(STAMP)  ## compare every format and compiler with the converted model; up to half an hour
	$(BIN)/python -m pytest -m "" tests/conformance

# The blocks of a page build on one another, so that they run in one process.
check: $(STAMP)  ## lint, types, direction of imports, code blocks of the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest docs README.md
	$(MAKE) docs

docs: $(STAMP)  ## build the documentation's site; warnings are errors
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs

reference: $(STAMP)  ## rewrite docs/reference from the code
	$(BIN)/python docs/generate_reference.py
	$(BIN)/python docs/generate_quantization.py
	$(BIN)/python docs/generate_distillation.py
	$(BIN)/python docs/generate_migration.py

readme: $(STAMP)  ## put the figures of the last demo, study and tables into README.md and docs
	$(BIN)/python docs/update_demo.py
