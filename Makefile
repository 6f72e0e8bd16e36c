PY := .venv/bin/python

.PHONY: setup quickstart test lint clean

setup: .venv/ready

.venv/ready: pyproject.toml
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing .venv && uv pip install --quiet --python $(PY) -e '.[dev]'; \
	else \
		python3 -m venv .venv && $(PY) -m pip install --quiet -e '.[dev]'; \
	fi
	@touch $@

quickstart: setup
	.venv/bin/nasattn search experiments/001_quickstart/experiment.yaml

# The slow tests, which CI runs too: make test PYTEST=
PYTEST ?= -m "not slow"

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto $(PYTEST)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv experiments/*/runs
