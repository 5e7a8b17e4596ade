# Two commands on a fresh machine: `make demo` and `make test`. Both make their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-ray lint types imports docs package proto proto-check check clean help

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(VENV)/.demo   ## set up, export, and run head and tail in two processes on real photographs
	$(BIN)/python -m deploy.demo --out build/demo

# The light install's test asks the package index for the client's packages: HEADTAIL_LIGHT_INSTALL= leaves it out.
test: export HEADTAIL_LIGHT_INSTALL ?= 1
test: $(VENV)/.dev .venvs/triton/.ok .venvs/promtool/.ok   ## set up and run all tests: three files at a time (JOBS=n: n), then those with Ray
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --ignore-glob='tests/integration/*_ray*'
	$(MAKE) --no-print-directory test-ray

# A cluster gives up a node that needs 30 s to start, so nothing runs beside it.
test-ray: $(VENV)/.dev   ## the tests on real Ray clusters alone, one after the other
	$(BIN)/python -m pytest $(wildcard tests/integration/*_ray*.py)

# tritonclient needs an older protobuf than ours: an environment of its own.
.venvs/triton/.ok:
	$(PYTHON) -m venv .venvs/triton
	.venvs/triton/bin/pip install --quiet --disable-pip-version-check 'tritonclient[grpc]'
	touch $@

.venvs/promtool/.ok: .ci/get_promtool
	.ci/get_promtool .venvs/promtool
	touch $@

check: lint types imports docs package proto-check   ## everything .ci/run checks beside the tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

docs: $(VENV)/.dev   ## build docs/ strictly into build/site, and check the pages that follow from the code
	$(BIN)/python docs/generate_reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

package: $(VENV)/.dev   ## build sdist and wheel into build/dist and look whether they hold what they should
	rm -rf build/dist && $(BIN)/python -m build --outdir build/dist . >build/package.log || (tail -n 30 build/package.log; exit 1)
	$(BIN)/python .ci/check_package.py build/dist

proto: $(VENV)/.dev   ## regenerate the stubs after a change of the schema
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. protos/headtail/v1/*.proto

proto-check: $(VENV)/.dev
	rm -rf build/proto && mkdir -p build/proto
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=build/proto --pyi_out=build/proto --grpc_python_out=build/proto \
	  protos/headtail/v1/*.proto
	for f in build/proto/protos/headtail/v1/*; do diff -u protos/headtail/v1/$$(basename $$f) $$f; done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The stamps hold the environment's state: a change of what is declared installs again.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.demo

clean:           ## remove the environment and everything built
	rm -rf $(VENV) build
