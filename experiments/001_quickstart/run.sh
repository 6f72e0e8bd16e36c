#!/usr/bin/env bash
# The figures of RESULTS.md: the search, its pictures, and every single insertion three times over.
set -euo pipefail
cd "$(dirname "$0")"
nasattn search experiment.yaml
nasattn report experiment.yaml
nasattn search singles.yaml
nasattn pareto singles.yaml
