#!/bin/sh
# Prints a Python that runs, 3.11 or newer, for the name PYTHON: PYTHON itself; for `python3` another
# of its versions, for `python3.12` another 3.12. Each is run before it is believed: a shim of pyenv
# stands on the PATH for every version that is installed, and starts only those that are selected.
# usage: tools/find_python.sh PYTHON
python=$1

try() {
    if "$1" -c "import sys; sys.exit(sys.version_info < (3, ${2:-11}))" >/dev/null 2>&1; then
        echo "$1"
        exit 0
    fi
}

try "$python"
case $python in
    python | python3) minors='13 12 11' ;;
    python3.1[1-9]) minors=${python#python3.} ;;
    *) exit 1 ;;
esac
root=$(pyenv root 2>/dev/null) || root=
for minor in $minors; do
    for candidate in "python3.$minor" "$root/versions/3.$minor."*/bin/python3; do
        try "$candidate" "$minor"
    done
done
exit 1
