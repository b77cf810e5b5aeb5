#!/bin/sh
# Prints a Python newer than PYTHON (3.13 or 3.12), or nothing where there is none.
# usage: tools/newest_python.sh PYTHON
tools=$(dirname "$0")
python=$(sh "$tools/find_python.sh" "$1") || exit 0
for minor in 13 12; do
    "$python" -c "import sys; sys.exit(sys.version_info >= (3, $minor))" || exit 0
    candidate=$(sh "$tools/find_python.sh" "python3.$minor") || continue
    if "$candidate" -c 'import ensurepip' >/dev/null 2>&1; then
        echo "$candidate"
        exit 0
    fi
done
