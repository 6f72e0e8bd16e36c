PY := .venv/bin/python

.PHONY: setup quickstart test lowest newer lint clean

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
XDIST := --numprocesses auto --dist worksteal

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest $(XDIST) $(PYTEST)

# The tests with the oldest versions that pyproject.toml names, in an environment of their own: for
# whoever changes one.
lowest:
	python3 -m venv .venv-lowest
	python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print('\n'.join(d.replace('>=', '==') for d in project['dependencies']))" >.venv-lowest/lowest.txt
	.venv-lowest/bin/pip install --quiet -e '.[dev]' -c .venv-lowest/lowest.txt
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest $(XDIST) -m "not slow"

# The tests with a newer Python than that of .venv, in an environment of their own; CI runs them where
# there is one.
NEWER ?= python3.13
newer: .venv-newer/ready
	OMP_NUM_THREADS=1 .venv-newer/bin/python -m pytest $(XDIST) -m "not slow"

.venv-newer/ready: pyproject.toml
	$(NEWER) -m venv .venv-newer
	.venv-newer/bin/pip install --quiet -e '.[dev]'
	@touch $@

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv .venv-lowest .venv-newer experiments/*/runs
