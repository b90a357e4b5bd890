# make demo: the whole study in miniature on embedded data.   make test: all checks.   make lint: style and types.
# make torture: hundreds of killed, stopped and corrupted runs, and each barrier of the kernels taken out.
# All set up .venv themselves, once.
# make gpu: what there is to measure on a GPU, in three stages: make gpu PYTHON=python3 STAGE=2 OUTPUT=dir needs no .venv.
# make test-export: exported files in the runtimes that `make test` does without, from requirements-export.txt, and in a browser where
# there are npm and chromium.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
REQUIREMENTS := requirements.txt requirements-dev.txt
INSTALLED := $(VENV)/installed-$(shell cat $(REQUIREMENTS) | sha256sum | cut -c 1-16)

.PHONY: demo demo-runs lint test test-export torture gpu
.DELETE_ON_ERROR:

$(INSTALLED): $(REQUIREMENTS)
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check $(addprefix -r ,$(REQUIREMENTS))
	rm -f $(VENV)/installed-* && touch $@

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(PYTHON) -m ruff check
	$(PYTHON) -m mypy

test-export: $(INSTALLED) deploy/web/node_modules
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-export.txt
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile -rs tests/test_export.py tests/test_onnx_int8.py tests/test_predict.py \
		tests/test_latency.py tests/test_web.py tests/test_runtimes_page.py

deploy/web/node_modules: deploy/web/package-lock.json
	-if command -v npm > /dev/null; then npm ci --silent --prefix deploy/web; fi

STAGE := 1
OUTPUT := runs/gpu-day/output
gpu: $(if $(filter $(VENV)/%,$(PYTHON)),$(INSTALLED))
	$(PYTHON) -m benchmarks.gpu_day --stage $(STAGE) --output "$(OUTPUT)" $(if $(DATA),--data "$(DATA)") $(FLAGS)

torture: $(INSTALLED)
	PYTHONPATH=. $(PYTHON) tests/torture.py
	TORTURE=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile tests/test_ptx.py tests/test_sass.py tests/test_layout.py \
		tests/test_softmax_kl.py tests/test_benchmarks.py tests/test_reliability.py

# --- the demo ---------------------------------------------------------------------------------------------------------
# Two one-thread processes side by side finish sooner than one with two threads.  What was interrupted goes on, what is finished stays:
# `rm -r runs/demo` starts over.
DEMO := runs/demo
RECIPE := --dataset synthetic --epochs 8 --batch-size 64 --opt sgd --lr 0.2 --weight-decay 5e-4 --warmup-epochs 2 \
          --label-smoothing 0 --clip-grad 0 --patience 0 --mix-prob 0.5 --resume auto
# Memory in huge pages, where glibc knows of them, costs fewer faults.
ENVIRONMENT := OMP_NUM_THREADS=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
RUN = @set -o pipefail; $(ENVIRONMENT) $(PYTHON) $(1) $(RECIPE) --output $(@D) 2>&1 | sed -u 's/^/[$(notdir $(@D))] /'
STUDENTS := $(addprefix $(DEMO)/,v1 v2 v3 v3.1 v4)

demo: $(INSTALLED)
	@$(MAKE) --no-print-directory -j 2 demo-runs
	@$(PYTHON) plots/make_figures.py --runs $(DEMO) --output figures
	@$(PYTHON) -m benchmarks.latency --quick $(DEMO)/v2

demo-runs: $(addsuffix /summary.json,$(DEMO)/teacher $(DEMO)/alone $(DEMO)/teacher-strong $(STUDENTS))

$(DEMO)/teacher/summary.json: | $(INSTALLED)
	$(call RUN,train_teacher.py --model v2_tiny)

$(DEMO)/alone/summary.json: | $(INSTALLED)
	$(call RUN,train_teacher.py --model v2_pico)

$(DEMO)/teacher-strong/summary.json: | $(DEMO)/teacher/summary.json
	$(call RUN,train_teacher.py --model v2_tiny --init $(DEMO)/teacher/best.pt --image-size 48)

$(DEMO)/v4/summary.json: | $(DEMO)/teacher-strong/summary.json
	$(call RUN,distill.py --experiment v4 --student v2_pico --teacher-checkpoint $(DEMO)/teacher-strong/best.pt)

$(DEMO)/v%/summary.json: | $(DEMO)/teacher/summary.json
	$(call RUN,distill.py --experiment v$* --student v2_pico --teacher-checkpoint $(DEMO)/teacher/best.pt)
