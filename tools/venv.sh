#!/bin/sh
# Makes a virtual environment and installs the project there, with the pins that fit its Python.
# usage: tools/venv.sh PYTHON VENV [EXTRAS [ALONE]]    for example: tools/venv.sh python3 .venv test
# ALONE: packages that are installed without what they depend on.
set -eu
python=$1 venv=$2 extras=${3:+[$3]} alone=${4:-}

fail() { echo "error: $1" >&2; exit 1; }

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    fail "$python does not run: install Python 3.11 or newer, or name one (make PYTHON=...)"
case $version in
    3.11) pins=constraints/jax-0.10.txt ;;                   # jax 0.12 needs Python 3.12
    3.1[2-9] | 3.[2-9][0-9]) pins=constraints/jax-0.12.txt ;;
    *) fail "$python is Python $version: 3.11 or newer is needed, name one (make PYTHON=...)" ;;
esac
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make a virtual environment: install python$version-venv (Debian, Ubuntu)"

# An environment of another Python, or a half-made one, is made anew.
have=$("$venv/bin/python" -c 'import pip, sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    have=none
if [ "$have" != "$version" ]; then
    echo "making $venv with Python $version"
    "$python" -m venv --clear "$venv"
fi
echo "installing llama_jax$extras into $venv with $pins"
PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --quiet -c "$pins" -e ".$extras"
if [ -n "$alone" ]; then
    # shellcheck disable=SC2086  # several packages are several words
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --quiet --no-deps -c "$pins" $alone
fi
