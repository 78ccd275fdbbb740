# Two commands, each alone on a fresh clone with Python 3.11, make and pip:
#   make run    proof that all runs: the networks of the paper's Table 4 at smoke scale; then the published table
#   make test   every check
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.made-from-the-lock
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1

.PHONY: run test docs env readme audit secrets tools clean
.DEFAULT_GOAL := run

run: $(STAMP)
	$(BIN)/cmkd run --scale smoke

test: $(STAMP)
	$(BIN)/python -m pytest -q tests/test_packaging.py tests/test_floors.py tests/test_notebooks.py
	$(BIN)/cmkd docs --check
	CMKD_PICTURES=0 $(BIN)/cmkd table all --scale smoke
	$(BIN)/python -m pytest -q tests --ignore tests/test_packaging.py --ignore tests/test_floors.py --ignore tests/test_notebooks.py

# All notebooks with what they show, as a site that needs no network: build/site/index.html
docs: $(STAMP)
	$(BIN)/cmkd docs

env: $(STAMP)

readme: $(STAMP)
	$(BIN)/python -c "from pathlib import Path; from cmkd.ledger.notebooks import as_markdown; Path('README.md').write_text(as_markdown('nbs/index.ipynb'))"

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] >= (3, 11) else "cmkd needs Python 3.11, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c requirements.lock -e '.[dev]'
	-git config filter.notebook.clean "sh -c 'test -x $(BIN)/cmkd && exec $(BIN)/cmkd clean || exec cat'"
	touch $@

# Known holes in what we depend on, as PyPI knows them
audit: TOOL = pip-audit
audit: tools
	.venv/tools/bin/pip-audit -r requirements.lock --no-deps --disable-pip

# Keys and passwords in the tree; a hash looks like one, so mere entropy is not asked for
secrets: TOOL = detect-secrets
secrets: tools
	git ls-files -z | xargs -0 .venv/tools/bin/detect-secrets-hook --disable-plugin HexHighEntropyString --disable-plugin Base64HighEntropyString

tools: $(STAMP)
	test -x .venv/tools/bin/python || $(PYTHON) -m venv .venv/tools
	.venv/tools/bin/pip install -q $(TOOL)

# What was made: the environment, rendered frames, smoke runs, executed notebooks. Published results stay.
clean:
	rm -rf .venv data build dist cmkd.egg-info .pytest_cache results/executed results/detections results/mine results/runs/smoke-*
