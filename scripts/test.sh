#!/usr/bin/env bash
# Sets up, then runs every test, fast ones first. Arguments go to pytest: scripts/test.sh -k pocket
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
bash "$ROOT/scripts/setup.sh"

# The tests in tests/web need a browser, and skip without one. Install it only where that is ours to do.
if ! command -v chromium google-chrome >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "test: installing a browser for tests/web"
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 || echo "test: no browser"
fi

cd "$ROOT"
exec "$(host_python)" -m pytest tests/core tests/host tests/server tests/web "$@"
