#!/usr/bin/env bash
# The figures of RESULTS.md, on a machine with a GPU: about eight minutes. Or a part of them:
#     ./run.sh [repeatable] [workers] [kills]
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1
python=${PYTHON:-$PWD/../../.venv/bin/python}
parts=" ${*:-repeatable workers kills} "
for part in $parts; do
    [[ " repeatable workers kills " == *" $part "* ]] ||
        { echo "got $part; allowed: repeatable, workers, kills" >&2; exit 2; }
done
mkdir -p runs

# experiment NAME TRIALS SED...: the quickstart, changed, in a folder of its own
experiment() {
    local folder=runs/$1 trials=$2
    shift 2
    rm -rf "$folder" && mkdir "$folder"
    sed -e "s#^space:.*#space: $PWD/../../search_spaces/cued_digits.yaml#" \
        -e "s/trials: 28/trials: $trials/" "$@" ../001_quickstart/experiment.yaml \
        >"$folder/experiment.yaml"
    echo "trainer: {accelerator: ${ACCELERATOR:-gpu}}" >>"$folder/experiment.yaml"
}
# In a subshell, which becomes the search: a kill then hits it and no shell around it.
search() {
    cd "runs/$1"
    exec "$python" -m nasattn search experiment.yaml "${@:2}" >>log 2>&1
}

[[ $parts != *" repeatable "* ]] || "$python" repeatable.py

for workers in 1 4 8; do
    [[ $parts == *" workers "* ]] || break
    experiment "workers$workers" 17
    begun=$(date +%s)
    (search "workers$workers" --workers "$workers")
    echo "17 trials by $workers workers: $(($(date +%s) - begun)) s"
done

[[ $parts == *" kills "* ]] || exit 0
short=(-e 's/train: 16000, val: 4000, test: 4000/train: 3200, val: 640, test: 640/'
    -e 's/training: {epochs: 1/training: {epochs: 3/')
experiment whole 9 "${short[@]}"
(search whole)
experiment torn 9 "${short[@]}"
for kills in 0 1 2 3 4 5 6; do
    search torn &
    [ "$kills" = 6 ] || sleep $((9 + RANDOM % 7))
    [ "$kills" = 6 ] || kill -9 $! 2>/dev/null || break
    wait $! || true
done
"$python" - "$kills" <<'END'
import sys
from nasattn.search.opening import load_study

def rows(name):
    trials = load_study(f"sqlite:///runs/{name}/runs/nasattn.db", "cued-digits").trials
    return [(t.number, t.architecture.key, t.state, t.score and t.score.accuracy) for t in trials]

same = rows("whole") == rows("torn")
print(f"9 trials, {sys.argv[1]} kills: {'as' if same else 'NOT as'} uninterrupted")
END
