# Two-stage offline distillation. `make help` lists the targets; every variable below can be set on the
# command line, as in `make distill TEACHER=runwayml/stable-diffusion-v1-5 DATA=pictures/ LEVEL=sd_tiny`.

PYTHON ?= python3
VENV   ?= .venv
LAUNCH ?= $(BIN)/python

TEACHER ?=
DATA    ?=
WORK    ?= work
LEVEL   ?= sd_small
STUDENTS ?= $(LEVEL)
RESOLUTION ?= 512
ROUNDS  ?= 4
CODEC   ?= dither
SNR_DB  ?= 15
STRIDE  ?= 2
STEPS   ?= 15000
BATCH   ?= 8
LR      ?= 1e-5
SEED    ?= 0
ENCODE_FLAGS  ?=
CACHE_FLAGS   ?=
DISTILL_FLAGS ?=

BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
LATENTS ?= $(WORK)/latents
CACHE   ?= $(WORK)/cache
STUDENT ?= $(WORK)/$(LEVEL)

.DEFAULT_GOAL := help
.PHONY: help install test lint encode teacher-cache distill clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  \1|\2/' | column -t -s '|'

install: $(READY) ## Make the environment in .venv with the pinned versions.

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test: $(READY) ## Run the tests and the linter.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

lint: $(READY) ## Run the linter alone.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

encode: $(READY) check-input ## Images and captions (DATA=) to latents, with the VAE and text encoder of TEACHER=.
	$(LAUNCH) -m pipeline.encode --teacher $(TEACHER) --data $(DATA) --out $(LATENTS) \
	  --resolution $(RESOLUTION) --seed $(SEED) $(ENCODE_FLAGS)

teacher-cache: encode ## Latents to the teacher's predictions and features: ROUNDS=, CODEC=, SNR_DB=, STRIDE=.
	$(LAUNCH) -m pipeline.teacher_cache --teacher $(TEACHER) --latents $(LATENTS) --out $(CACHE) --rounds $(ROUNDS) \
	  --codec $(CODEC) --snr-db $(SNR_DB) --token-stride $(STRIDE) --students $(STUDENTS) --seed $(SEED) $(CACHE_FLAGS)

distill: teacher-cache ## Train the student of LEVEL= for STEPS= steps; ends with a diffusers pipeline.
	$(LAUNCH) -m pipeline.distill --cache $(CACHE) --out $(STUDENT) --level $(LEVEL) --max-train-steps $(STEPS) \
	  --train-batch-size $(BATCH) --learning-rate $(LR) --seed $(SEED) $(DISTILL_FLAGS)

check-input:
	@test -n '$(TEACHER)' || { echo 'Error: set TEACHER= to a Stable Diffusion checkpoint (a folder or a hub name)' >&2; exit 2; }
	@test -n '$(DATA)' || { echo 'Error: set DATA= to a folder of images with a metadata.jsonl' >&2; exit 2; }

clean: ## Remove what the stages wrote under WORK=, and caches of the tools. Keeps .venv.
	rm -rf '$(WORK)' .pytest_cache .ruff_cache .hypothesis
