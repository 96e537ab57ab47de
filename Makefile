# Two commands do everything: `make quickstart` and `make test`. Each target makes the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: help install dev browser quickstart app test lanes lint site peers bench clean

help: ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## environment with what training, generating and the app need

dev: $(VENV)/.dev ## the same with test tools and linters

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python requirements.txt constraints.txt pyproject.toml
	@echo "installing into $(VENV) ..."
	$(PIP) -e ".[train,app,fast]"
	@touch $@

$(VENV)/.dev: $(VENV)/.installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

# The page is tested in a real browser: the system's, else one that apt or playwright can bring.
browser: $(VENV)/.dev
	@command -v chromium chromium-browser google-chrome >/dev/null 2>&1 \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
	|| $(BIN)/playwright install chromium \
	|| echo "no browser could be installed: the page's browser tests will skip"

quickstart: $(VENV)/.installed ## train a small GPT on Python's own source, sample from it, say what to do next
	$(BIN)/nanogpt-hub train quickstart
	$(BIN)/nanogpt-hub generate out/quickstart/best --prompt "def " --temperature 0.6 --max-new-tokens 200 --seed 1
	@echo
	@echo "Your model is in out/quickstart/best. Next:"
	@echo "  open the app:          make app"
	@echo "  train on your text:    $(BIN)/nanogpt-hub train quickstart --data.source my.txt --out_dir out/my"
	@echo "  type nanogpt-hub only: source $(BIN)/activate"
	@echo "  watch how it learned:  out/quickstart/loss.png, out/quickstart/samples/"

app: $(VENV)/.installed ## open the app beside your runs
	$(BIN)/python app.py --runs out

test: $(VENV)/.dev browser ## all tests (environment, browser and all)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lanes: $(VENV)/.dev browser ## the tests of what makes texts, as on other CPUs and without Numba
	bash .ci/lanes

lint: $(VENV)/.dev ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

site: $(VENV)/.dev ## docs, course and reference as a site in build/site; a broken link is an error
	$(BIN)/mkdocs build

peers: $(VENV)/.dev ## the programs that benchmarks compare with
	$(PIP) -r requirements-peers.txt

bench: $(VENV)/.dev ## the benchmarks, as tables; with NANOGPT=DIR against that checkout, after `make peers` against more
	$(BIN)/python -m benchmarks $(if $(NANOGPT),--nanogpt $(NANOGPT))

clean: ## remove the environment and caches, never out/
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
