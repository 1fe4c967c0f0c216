# Two-stage offline distillation. `make help` lists the targets and the variables, which are set on the command line,
# as in `make distill TEACHER=path/to/checkpoint DATA=path/to/images LEVEL=sd_tiny`.
# Without TEACHER, the stages run on a bundled demo teacher and generated scenes: SD in miniature, or with FAMILY=sdxl
# SDXL. With CONFIG=run.yaml, each stage takes its options from that file alone, and from ENCODE_FLAGS, CACHE_FLAGS and
# DISTILL_FLAGS.

PYTHON ?= python3
VENV   ?= .venv
LAUNCH ?= $(BIN)/python

CONFIG   ?=
# sd or sdxl: it only chooses defaults, of the teacher, the level and the resolution.
FAMILY   ?= sd
$(if $(filter-out sd sdxl,$(FAMILY)),$(error FAMILY=$(FAMILY) is not one of sd, sdxl))
for_sdxl = $(if $(filter sdxl,$(FAMILY)),$(1),$(2))
TEACHER  ?= $(call for_sdxl,demo-xl,demo)
LEVEL    ?= $(call for_sdxl,sdxl_small,sd_small)
STUDENTS ?= $(LEVEL)
CODEC    ?= dither
SNR_DB   ?= 5
TOKENS   ?= 64
SEED     ?= 0
# Guidance also uses the prediction for the empty prompt, so the student has to learn it as well.
UNCOND   ?= 0.1
ENCODE_FLAGS  ?=
CACHE_FLAGS   ?=

# Variables of earlier versions.
$(foreach name,STRIDE TOKEN_MIN,$(if $(filter command line,$(origin $(name))),$(error $(name)= was replaced by TOKENS=)))

DEMO := $(if $(word 2,$(TEACHER)),,$(filter demo demo-xl,$(TEACHER)))

ifneq ($(DEMO),)
WORK       ?= work/$(DEMO)
DATA       ?= $(WORK)/scenes
SCENES     ?= 2000
RESOLUTION ?= 64
ROUNDS     ?= 2
SAMPLES    ?= 64
GUIDANCE   ?= 5
STEPS      ?= 750
BATCH      ?= 16
LR         ?= 1e-3
DISTILL_FLAGS ?= --use-ema --output-weight 5 --feature-weight 0.1
else
WORK       ?= work
DATA       ?=
RESOLUTION ?= $(call for_sdxl,1024,512)
ROUNDS     ?= 4
SAMPLES    ?= 8
GUIDANCE   ?= 7
STEPS      ?= 15000
BATCH      ?= 8
LR         ?= 1e-5
DISTILL_FLAGS ?=
endif

# A value in quotes, whatever it holds.
q = '$(subst ','\'',$(1))'

BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
TOOLS   ?= $(VENV)/tools
LATENTS ?= $(WORK)/latents
CACHE   ?= $(WORK)/cache
STUDENT ?= $(WORK)/$(LEVEL)

ifneq ($(CONFIG),)
ENCODE_OPTIONS  := --config $(call q,$(CONFIG))
CACHE_OPTIONS   := --config $(call q,$(CONFIG))
DISTILL_OPTIONS := --config $(call q,$(CONFIG))
DISTILL_FLAGS   :=
else
ENCODE_OPTIONS  := --teacher $(call q,$(TEACHER)) --data $(call q,$(DATA)) --out $(call q,$(LATENTS)) \
  --resolution $(RESOLUTION) --seed $(SEED)
CACHE_OPTIONS   := --teacher $(call q,$(TEACHER)) --latents $(call q,$(LATENTS)) --out $(call q,$(CACHE)) \
  --rounds $(ROUNDS) --codec $(CODEC) --snr-db $(SNR_DB) --tokens $(TOKENS) \
  --students $(STUDENTS) --samples $(SAMPLES) --samples-guidance $(GUIDANCE) --uncond-fraction $(UNCOND) --seed $(SEED)
DISTILL_OPTIONS := --cache $(call q,$(CACHE)) --out $(call q,$(STUDENT)) --level $(LEVEL) \
  --max-train-steps $(STEPS) --train-batch-size $(BATCH) --learning-rate $(LR) --seed $(SEED)
endif

.DEFAULT_GOAL := help
.PHONY: help install test test-gpu lint encode teacher-cache distill data check-teacher-cache check-distill clean

# What can be set on the command line, as `make help` shows it.
VARIABLES := FAMILY TEACHER DATA LEVEL STUDENTS WORK CONFIG SCENES RESOLUTION ROUNDS CODEC SNR_DB TOKENS \
  UNCOND SAMPLES GUIDANCE STEPS BATCH LR SEED ENCODE_FLAGS CACHE_FLAGS DISTILL_FLAGS \
  LATENTS CACHE STUDENT PYTHON VENV TOOLS LAUNCH

help: ## List the targets and the variables.
	@echo 'Targets:'
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  \1|\2/' | column -t -s '|'
	@echo 'Variables, and their values with FAMILY=$(FAMILY) TEACHER=$(TEACHER):'
	@$(foreach name,$(VARIABLES),printf '  %-13s  %s\n' $(name) $(call q,$($(name)));)

install: $(READY) ## Create the environment in .venv with the pinned versions.

# Without --no-compile, pip compiles every module of every package, most of which are never imported.
$(READY): pyproject.toml constraints.txt
	@echo 'Installing the packages of constraints.txt in $(VENV). They are large, so this takes some minutes.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

# img2dataset needs an older webdataset than this project, so it gets its own environment.
$(TOOLS)/bin/img2dataset:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --no-compile 'img2dataset==1.47.0'

test: lint $(TOOLS)/bin/img2dataset ## Run the linter, the type checker and the tests.
	OMP_NUM_THREADS=1 IMG2DATASET='$(abspath $(TOOLS))/bin/img2dataset' $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20

test-gpu: $(READY) ## Run the tests that need a CUDA GPU.
	$(BIN)/python -m pytest tests/gpu -rs --durations 20

lint: $(READY) ## Run the linter and the type checker alone.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

encode: $(READY) data ## Encode images and captions (DATA=) with the VAE and text encoder of TEACHER=.
	$(LAUNCH) -m pipeline.encode $(ENCODE_OPTIONS) $(ENCODE_FLAGS)

teacher-cache: encode ## Run the teacher on the latents: ROUNDS=, CODEC=, SNR_DB=, TOKENS=.
	$(LAUNCH) -m pipeline.teacher_cache $(CACHE_OPTIONS) $(CACHE_FLAGS)

distill: teacher-cache ## Train the student of LEVEL= for STEPS= steps, to a diffusers pipeline and a report.
	$(LAUNCH) -m pipeline.distill $(DISTILL_OPTIONS) $(DISTILL_FLAGS)

# The options of the later stages are checked before anything is encoded.
CHECKS := $(if $(filter distill teacher-cache,$(MAKECMDGOALS)),check-teacher-cache) \
  $(if $(filter distill,$(MAKECMDGOALS)),check-distill)

check-teacher-cache: $(READY)
	@$(BIN)/distill-sd teacher-cache $(CACHE_OPTIONS) $(CACHE_FLAGS) --check

check-distill: $(READY)
	@$(BIN)/distill-sd distill $(DISTILL_OPTIONS) $(DISTILL_FLAGS) --check

data: $(READY) $(CHECKS)
ifneq ($(CONFIG),)
	@test -f $(call q,$(CONFIG)) || { echo Error: CONFIG=$(call q,$(CONFIG)) is not a file >&2; exit 2; }
else ifneq ($(DEMO),)
	$(BIN)/distill-sd demo-scenes --out $(call q,$(DATA)) --count $(SCENES) --seed $(SEED)
else
	@test -n $(call q,$(DATA)) || { echo 'Error: set DATA= to a folder of images with captions, or another input that --data accepts' >&2; exit 2; }
endif

clean: ## Delete WORK= and the caches of the tools. Keeps .venv.
	rm -rf $(call q,$(WORK)) .pytest_cache .ruff_cache .mypy_cache .hypothesis
