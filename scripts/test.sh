#!/usr/bin/env bash
# Sets up .venv if needed, then runs the test suite in two processes. Arguments are pytest's, which then runs in one:
#   ./scripts/test.sh tests/engine -x
set -euo pipefail
arguments=("$@")
((${#arguments[@]})) || arguments=(-n 2)
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$VENV_PYTHON" -P -m pytest -q ${arguments[@]+"${arguments[@]}"}
