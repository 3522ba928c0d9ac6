#!/usr/bin/env bash
# The first run: makes .venv, builds firstlm, and shows FiRST on the embedded model, from training to
# a table and a picture in runs/quickstart. What is there already is reused. Arguments go to
# scripts/quickstart.py (see --help).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
firstlm_environment
exec python scripts/quickstart.py "$@"
