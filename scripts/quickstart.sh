#!/usr/bin/env bash
# Sets up .venv if needed, then trains a small model on a CPU by GRPO, proving at every step that rollout and trainer
# agree bit for bit. Overrides are passed on: ./scripts/quickstart.sh numerics=native
set -euo pipefail
overrides=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$VENV_PYTHON" recipes/grpo.py cluster.device=cpu ${overrides[@]+"${overrides[@]}"}
