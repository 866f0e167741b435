# Sourced by run, test and bench: creates or updates a virtual environment in the checkout.
# Sets $root to the root of the checkout and puts the environment on PATH.
# Usage: . launch/setup.sh EXTRAS      e.g. "" or "[test]"

extras=$1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=${PYTHON:-python3}

"$python" - <<'CHECK' || exit 2
import sys
if sys.version_info < (3, 11):
    sys.exit(f"dist_tl requires Python 3.11 or newer, got {sys.version.split()[0]}; set PYTHON=")
CHECK

# The installation is up to date if this text equals the one stored when it was made.
wanted=$(cat "$root/pyproject.toml"; "$python" -V; echo "$root")
have() { [ "$(cat "$venv/.installed-for$1" 2>/dev/null)" = "$wanted" ]; }
if ! have "$extras"; then
    echo "setting up $venv (only once, takes a few minutes)" >&2
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || exit 3
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --editable "$root$extras" 2> >(grep -v "is ignored: it is neither a file" >&2) || exit 3
    printf '%s' "$wanted" > "$venv/.installed-for$extras"
fi
export PATH="$venv/bin:$PATH"
