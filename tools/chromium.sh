#!/bin/sh
# Installs Chromium by the system's package manager where it is not there, for the tests of the page.
# Prints one line where it cannot: those tests are skipped then.
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if "$name" --version >/dev/null 2>&1; then exit 0; fi  # Ubuntu has one that only asks for snap
done
if [ "$(id -u)" -ne 0 ]; then
    echo 'no Chromium, and no leave to install it: the tests of the page are skipped'
elif command -v apt-get >/dev/null 2>&1; then
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 ||
        echo 'Chromium could not be installed by apt-get: the tests of the page are skipped'
elif command -v dnf >/dev/null 2>&1; then
    dnf install -y -q chromium >/dev/null 2>&1 ||
        echo 'Chromium could not be installed: the tests of the page are skipped'
else
    echo 'no package manager that has Chromium is known: the tests of the page are skipped'
fi
