#!/usr/bin/env bash
# The table of real learning curves (about 2.5 hours of one core for three seeds; goes on where it stopped), and what it says.
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1
python curves.py 3
python curves.py tau
python simulate.py
python searches.py
