#!/bin/sh
# pip install '.[bench]' first. Runs what results.csv does not hold yet (all: delete it; half an hour of
# one core), prints the table of RESULTS.md, draws the picture.
set -e
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1
python bench.py run results.csv "$@"
python bench.py table results.csv
python bench.py draw results.csv
