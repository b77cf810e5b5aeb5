#!/bin/sh
# Prints a Python newer than PYTHON (3.13 or 3.12), or nothing where there is none.
# Each candidate is run: a pyenv shim stands on the PATH for versions that then do not start.
# usage: tools/newest_python.sh PYTHON
python=$1
root=$(pyenv root 2>/dev/null) || root=
for minor in 13 12; do
    "$python" -c "import sys; sys.exit(sys.version_info >= (3, $minor))" || exit 0
    for candidate in "python3.$minor" "$root/versions/3.$minor."*/bin/python3; do
        if "$candidate" -c "import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, $minor))" \
            >/dev/null 2>&1; then
            echo "$candidate"
            exit 0
        fi
    done
done
