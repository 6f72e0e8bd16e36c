#!/bin/sh
# The figures of RESULTS.md: a study of 5,000 trials, and one of 100 beside it.
set -e
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1
rm -rf runs
for trials in 100 5000; do
    echo "$trials trials"
    mkdir -p "runs/$trials"  # of its own: the studies have one name
    python long.py make "runs/$trials/long.db" --trials "$trials"
    python long.py measure "runs/$trials/long.db"
    python long.py loop "runs/$trials/long.db" --trials 20
    python long.py grow "runs/$trials/long.db"
done
