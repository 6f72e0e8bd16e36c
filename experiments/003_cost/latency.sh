#!/bin/sh
# How well a table of single blocks predicts the latency of whole networks, on this machine.
# latency.sh [REPEATS]: each starts from nothing, so what differs between them is the noise.
set -eu
cd "$(dirname "$0")"
nasattn=${NASATTN:-../../.venv/bin/nasattn}
for repeat in $(seq "${1:-1}"); do
    for runtime in torch onnxruntime; do
        table=runs/latency-$runtime-$repeat.yaml
        echo "== $runtime, repeat $repeat: $(uptime)"
        rm -f "$table"
        # What has not settled is tried once more; the rest is kept.
        for try in first second; do
            "$nasattn" profile latency.yaml --runtime "$runtime" --out "$table" && break
            echo "after the $try try: $(uptime)"
        done
    done
done
