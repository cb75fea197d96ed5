# Everything a fresh clone needs: Python 3.10 to 3.13 and a C++17 compiler. `make` lists the targets.
VENV ?= .venv
PYTHON ?=
export SPROMPT_NO_EXT SPROMPT_WERROR

BIN := $(VENV)/bin
# tools of the environment first: cmake, ninja and clang-format of constraints.txt
export PATH := $(abspath $(BIN)):$(PATH)

CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CHECKED = sprompt tests benchmarks examples tools setup.py
NATIVE = CMakeLists.txt setup.py $(CXX_FILES)

.PHONY: help venv build test test-all demo bench gpu gpu-prepare support lint format sanitize hooks clean

help: ## list the targets
	@echo "make demo    the whole chain on synthetic scenes     make test    all tests"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-11s %s\n", $$1, $$2}'
	@echo
	@echo "Each sets up what it needs in $(VENV) (VENV=... for another place, PYTHON=... for another interpreter)."
	@echo "SPROMPT_NO_EXT=1 make ... works without a compiler, on the slow reference."

venv: $(VENV)/.ready ## the virtual environment, at the versions of constraints.txt

$(VENV)/.ready: constraints.txt pyproject.toml tools/venv.sh
	@tools/venv.sh "$(VENV)" "$(PYTHON)"

build: $(VENV)/.built ## compile the kernels in place

ifneq ($(filter-out 0,$(SPROMPT_NO_EXT)),)
.PHONY: $(VENV)/.built
$(VENV)/.built: $(VENV)/.ready
	@echo "SPROMPT_NO_EXT=$(SPROMPT_NO_EXT): kernels are not built"
else
$(VENV)/.built: $(VENV)/.ready $(NATIVE)
	@echo "building the kernels"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@
endif

test: build ## all tests, and the slow levels for the ops that changed (ARGS="-k iou" goes to pytest)
	@tools/test.sh $(BIN) $(ARGS)

test-all: build ## all tests, slow levels and sanitizers of every op; then .ci/base names the commit
	@SPROMPT_TEST_OPS=all tools/test.sh $(BIN)
	@SPROMPT_TEST_OPS=all PYTHON=$(abspath $(BIN))/python tools/sanitize.sh
	@$(BIN)/python tools/changed.py --passed

demo: build ## scenes, proposals, pre-training, fine-tuning, AP table and gallery in demo/ (about five minutes on two cores)
	@$(BIN)/python -m sprompt.cli demo $(ARGS)

bench: build ## the benchmark table (ARGS="--op mask_iou" chooses; --help lists)
	@$(BIN)/python -m benchmarks.run $(ARGS)

support: build ## write the generated tables of docs/support.md anew
	@$(BIN)/python -m sprompt.env --write docs/support.md

lint: venv ## ruff, clang-format and mypy, as CI runs them
	@$(BIN)/ruff check $(CHECKED)
	@$(BIN)/ruff format --check $(CHECKED)
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	@$(BIN)/mypy

format: venv ## let ruff and clang-format rewrite the files
	@$(BIN)/ruff check --fix $(CHECKED)
	@$(BIN)/ruff format $(CHECKED)
	@$(BIN)/clang-format -i $(CXX_FILES)

gpu: ## on a machine with an NVIDIA GPU: build, test every promise, measure (OUT=folder, PYTHON=the one with torch)
	@PYTHON="$(PYTHON)" OUT="$(OUT)" TOTAL="$(TOTAL)" tools/gpu.sh

gpu-prepare: ## on a machine without one: build/gpu-kit, with which `make gpu` compiles nothing there (PYTHON=that machine's version)
	@PYTHON="$(PYTHON)" tools/gpu_prepare.sh

sanitize: venv ## tests of the ops that changed, under AddressSanitizer and UndefinedBehaviorSanitizer
	@PYTHON=$(abspath $(BIN))/python tools/sanitize.sh

hooks: venv ## run lint before every commit (installs pre-commit into the environment)
	@$(BIN)/python -m pip install --quiet -c constraints.txt pre-commit
	@$(BIN)/pre-commit install

clean: ## remove what was built; the environment stays
	rm -rf build dist *.egg-info demo sprompt/_C*.so sprompt/_C*.pyd $(VENV)/.built
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
