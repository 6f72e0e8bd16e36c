#!/bin/sh
# What results.csv does not hold yet: all methods, tables and costs by 10 seeds, then the table of RESULTS.md. pip install '.[bench]' first.
set -e
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1
python bench.py run results.csv "$@"
python bench.py table results.csv
python bench.py draw results.csv
