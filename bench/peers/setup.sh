#!/usr/bin/env bash
# An environment of its own for each peer below .bench/, exactly as pinned. A second call only compares a hash.
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly PYTHON=${PYTHON:-.venv/bin/python}

provide() {
    local name=$1 pins=bench/peers/$1/requirements.txt home=.bench/$1 wanted
    wanted=$({ pwd; cat "$pins"; } | sha256sum)
    [ "$(cat "$home/pins.sha256" 2>/dev/null)" = "$wanted" ] && return
    echo "[bench] environment for $name in $home (about 300 MB, a minute)"
    "$PYTHON" -m venv --clear "$home"
    "$home/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$pins"
    echo "$wanted" >"$home/pins.sha256"
}

provide flower
provide flare
