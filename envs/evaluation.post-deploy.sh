#!/usr/bin/env bash
# Run by Snakemake in the environment of evaluation.yaml.
set -euo pipefail
python -m pip install --quiet --no-deps -r "$(dirname "$0")/requirements-evaluation.txt"
