# Sourced by quickstart.sh and test.sh: a virtual environment with pinned dependencies, made once.
# Leaves the working directory at the repository's root and sets $VENV_PYTHON.
#   RLALIGN_VENV    folder of the environment (default: .venv)
#   RLALIGN_PYTHON  interpreter to make it with (default: the first suitable one found)

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${RLALIGN_VENV:-.venv}"
VENV_PYTHON="$VENV/bin/python"
TORCH="torch==2.13.0"
CPU_WHEELS="https://download.pytorch.org/whl/cpu"

say() { printf '%s\n' "$*" >&2; }

die() {
    say "$@"
    exit 1
}

supported() { # is $1 a working Python 3.11, 3.12 or 3.13?
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${RLALIGN_PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if supported "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "rlalign needs Python 3.11, 3.12 or 3.13, and none was found. On Debian or Ubuntu:" \
        $'\n'"    sudo apt-get install -y python3 python3-venv"
}

make_venv() {
    local python
    python="$(find_python)"
    # Debian ships venv without its other half, so both are asked for
    if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        local version
        version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
        die "$python can't make virtual environments yet. On Debian or Ubuntu:" \
            $'\n'"    sudo apt-get install -y python$version-venv"
    fi
    say "Making $VENV with $("$python" --version) ..."
    "$python" -m venv --clear "$VENV"
}

install_cpu_torch() {
    # Without a GPU the CPU build does the same and is a tenth of the size. Not every pip can reach the place that
    # has it; then the ordinary build, which the main install takes, is as good.
    local index=()
    if "$VENV_PYTHON" -c "import urllib.request as r; r.urlopen('$CPU_WHEELS/torch/', timeout=5)" >/dev/null 2>&1; then
        index=(--extra-index-url "$CPU_WHEELS")
    fi
    "$VENV_PYTHON" -m pip install --quiet --no-deps ${index[@]+"${index[@]}"} "$TORCH+cpu" >/dev/null 2>&1 ||
        say "No CPU build of $TORCH is in reach; taking the ordinary one."
}

fingerprint() { # changes whenever another install is needed
    "$VENV_PYTHON" - <<'PYTHON'
import hashlib, pathlib, sys
files = ("pyproject.toml", "constraints.txt", "scripts/setup.sh")
digest = hashlib.sha256(repr((sys.version, pathlib.Path.cwd())).encode())
for name in files:
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PYTHON
}

set_up() {
    local stamp="$VENV/rlalign-installed"
    # "if", not "||": errexit must hold inside make_venv
    if ! supported "$VENV_PYTHON"; then make_venv; fi
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$(fingerprint)" ]]; then
        return
    fi
    say "Installing pinned dependencies into $VENV (once; a few minutes) ..."
    command -v nvidia-smi >/dev/null 2>&1 || install_cpu_torch
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
    fingerprint >"$stamp"
}

set_up
