#!/bin/sh
# Makes a virtual environment and installs the project there, with the pins that fit its Python.
# usage: tools/venv.sh PYTHON VENV [EXTRAS [ALONE]]    for example: tools/venv.sh python3 .venv test
# ALONE: packages that are installed without what they depend on.
# ACCELERATOR in the environment: what JAX will run on, as tools/accelerator.py takes it. Unset: CPU.
set -eu
named=$1 venv=$2 extras=${3:-} alone=${4:-}
tools=$(dirname "$0")
export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() { echo "error: $1" >&2; exit 1; }

python=$(sh "$tools/find_python.sh" "$named") || {
    version=$("$named" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        fail "$named does not run: install Python 3.11 or newer, or name one (make PYTHON=...)"
    fail "$named is Python $version: 3.11 or newer is needed, name one (make PYTHON=...)"
}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
    3.11) line=jax-0.10 ;;  # jax 0.12 needs Python 3.12
    *) line=jax-0.12 ;;
esac
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make a virtual environment: install python$version-venv (Debian, Ubuntu)"
asked=${ACCELERATOR:-cpu}
accelerator=$("$python" "$tools/accelerator.py" "$asked") || exit 1

# An environment of another Python, or a half-made one, is made anew.
have=$("$venv/bin/python" -c 'import pip, sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    have=none
if [ "$have" != "$version" ]; then
    echo "making $venv with Python $version ($python)"
    "$python" -m venv --clear "$venv"
fi
pip() { "$venv/bin/python" -m pip --quiet "$@"; }

set -- -c "constraints/$line.txt"
case $accelerator in
    cuda12) others='jax-cuda13-plugin jax-cuda13-pjrt' ;;
    cuda13) others='jax-cuda12-plugin jax-cuda12-pjrt' ;;
    *) others= ;;
esac
if [ -n "$others" ]; then
    # The libraries of CUDA have pins of their own: PyTorch names other versions of them.
    set -- "$@" -c "constraints/cuda-$line.txt"
    # shellcheck disable=SC2086  # JAX takes one of the two
    pip uninstall --yes $others 2>/dev/null
fi
extras=$extras${accelerator:+${extras:+,}$accelerator}
extras=${extras:+[$extras]}
echo "installing llama_jax$extras into $venv with constraints/$line.txt"
pip install "$@" -e ".$extras"
if [ -n "$alone" ]; then
    # shellcheck disable=SC2086  # several packages are several words
    pip install --no-deps "$@" $alone
fi
case $asked-$accelerator in
    auto-cuda* | cuda-cuda*)
        # It would use the CPU in silence.
        JAX_PLATFORMS=cuda,cpu "$venv/bin/python" -c '
import jax
devices = jax.devices()
print(f"JAX sees {len(devices)} x {devices[0].device_kind}")' ||
            fail 'JAX is installed, but does not get at the GPU (see above); make ACCELERATOR=cpu goes on without' ;;
esac
