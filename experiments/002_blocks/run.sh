#!/bin/sh
# What RESULTS.md holds: ten minutes on one core. `sh run.sh cuda` does the same on a GPU.
set -e
cd "$(dirname "$0")"
python="${PYTHON:-../../.venv/bin/python}"
device="${1:-cpu}"
export OMP_NUM_THREADS=1 KINETO_LOG_LEVEL=99
"$python" bench.py speed --device "$device"
"$python" bench.py growth --device "$device"
"$python" tables.py "$device" > "tables_$device.md"
"$python" draw.py
