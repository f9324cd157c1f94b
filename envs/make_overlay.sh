#!/usr/bin/env bash
# Makes an environment in the folder $1 over the one in $2: what is there is seen, what pip gets from the remaining
# arguments is seen first. So torch is not installed twice. Safe to run again after an interruption.
set -euo pipefail
venv=$1 below=$2
shift 2
site='import sysconfig; print(sysconfig.get_path("purelib"))'
[ -x "$venv/bin/python" ] || "$below/bin/python3" -m venv --without-pip "$venv"
"$below/bin/python3" -c "$site" >"$("$venv/bin/python" -c "$site")/below.pth"
"$below/bin/pip" --python "$venv/bin/python" install --quiet --disable-pip-version-check "$@"
