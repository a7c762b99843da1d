#!/usr/bin/env bash
# Sets up, then runs every test, fast ones first. Arguments go to pytest: scripts/test.sh -k pocket
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
bash "$ROOT/scripts/setup.sh"

# The tests in tests/web need a browser, and skip without one. Install it only where that is ours to do.
if ! command -v chromium google-chrome >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "test: installing a browser for tests/web"
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 || echo "test: no browser"
fi

# tests/web run with the host's own frontend and with this newer one.
FRONTEND=1.58.1
if [ ! -d "$ROOT/.host/frontend/$FRONTEND" ]; then
    echo "test: fetching frontend $FRONTEND for tests/web"
    work="$ROOT/.host/frontend.$$"
    mkdir -p "$ROOT/.host/frontend" "$work"
    if "$(host_python)" -m pip download -qq --disable-pip-version-check --no-deps --dest "$work" "comfyui-frontend-package==$FRONTEND"; then
        "$(host_python)" -m zipfile -e "$work"/*.whl "$work/unpacked"
        mv "$work/unpacked/comfyui_frontend_package/static" "$ROOT/.host/frontend/$FRONTEND"
    else
        echo "test: no frontend $FRONTEND"
    fi
    rm -rf "$work"
fi

# One thread, also in the processes that tests start: how a sum is shared out among threads decides its last place, and some
# tests compare a run in a process of its own with one in theirs.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cd "$ROOT"

# Two halves at once, each for one core. Arguments may leave one of them without a test (code 5 of pytest).
half() { "$(host_python)" -m pytest "${@}" || { local code=$?; [ "$code" = 5 ] || return "$code"; }; }
half tests/core tests/machines tests/server tests/web "$@" &
other=$!
code=0
half tests/host "$@" || code=$?
wait "$other" || code=$?
exit "$code"
