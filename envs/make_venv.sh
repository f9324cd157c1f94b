#!/usr/bin/env bash
# Makes the environment in the folder $1 (default .venv) from envs/requirements.txt; safe to run again after an interruption.
set -euo pipefail
venv=${1:-.venv}
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)

"$python" - <<'PY' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}; set PYTHON=/path/to/python3.11")
PY

if [ ! -x "$venv/bin/pip" ]; then
    complaint=$(mktemp)
    trap 'rm -f "$complaint"' EXIT
    if ! "$python" -m venv "$venv" >"$complaint" 2>&1; then
        # Debian splits ensurepip off into python3-venv; an existing pip can fill the gap.
        "$python" -m venv --without-pip "$venv" && "$python" -m pip --python "$venv/bin/python" install --quiet pip || {
            cat "$complaint" >&2
            echo "error: Python's venv module is incomplete; on Debian and Ubuntu: apt-get install python3-venv" >&2
            exit 1
        }
    fi
fi

echo "installing into $venv (several hundred MB the first time)"
"$venv/bin/pip" install --quiet --no-compile --disable-pip-version-check -r "$here/requirements.txt"
# On all cores, which pip would not do; some packages carry files for other Pythons.
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true
touch "$venv/.ready"
