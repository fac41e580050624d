#!/usr/bin/env bash
# Run one job of ci/matrix.yml locally: ci/run.sh cpu
set -euo pipefail
cd "$(dirname "$0")/.."

job=${1:?usage: ci/run.sh JOB, one of those in ci/matrix.yml}
make --no-print-directory install-dev
fields=$(.venv/bin/python ci/matrix.py shell "$job")
eval "$fields"

if [ -n "$command" ]; then
  exec bash -c "$command"
fi
make --no-print-directory test-models
exec .venv/bin/pytest -m "$markers"
