#!/bin/sh
# The figures of RESULTS.md, in about 5 minutes on a quiet machine: the engine's own time a trial, and
# how trials a second grow with the workers, on sqlite and on a PostgreSQL of its own.
set -e
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1
python=${PYTHON:-python}
rm -rf runs && mkdir runs
$python bench.py engine runs/engine
echo "sqlite"
$python bench.py scale "sqlite:///$PWD/runs/scale.db"
../../tests/postgres.sh install
server=$(mktemp -d /tmp/nasattn-bench-XXXXXX)
trap '../../tests/postgres.sh stop "$server"; rm -rf "$server"' EXIT
url=$(../../tests/postgres.sh start "$server")
echo "PostgreSQL"
$python bench.py scale "$url"
