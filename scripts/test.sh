#!/usr/bin/env bash
# Sets up .venv if needed, then runs the test suite. Arguments are pytest's: ./scripts/test.sh tests/engine -x
set -euo pipefail
arguments=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$VENV_PYTHON" -P -m pytest -q ${arguments[@]+"${arguments[@]}"}
