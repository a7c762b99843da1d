# Sourced by the other scripts: where things are, and how threads wait.
set -euo pipefail
# Threads that wait sleep: beside another busy program, those that spin make small work twenty times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PACK_NAME="hywu"                                   # name of the link in custom_nodes; web files are served under it
VENV="$ROOT/.venv"
HOST_DIR="${COMFYUI_DIR:-$ROOT/.host/ComfyUI}"     # COMFYUI_DIR=/path/to/ComfyUI uses your own host

die() { echo "error: $*" >&2; exit 1; }

host_python() {  # the interpreter that runs the host: yours if you named or have one, else ours
    if [ -n "${COMFYUI_PYTHON:-}" ]; then echo "$COMFYUI_PYTHON"; return; fi
    if [ -n "${COMFYUI_DIR:-}" ]; then
        for candidate in "$COMFYUI_DIR/.venv/bin/python" "$COMFYUI_DIR/venv/bin/python"; do
            if [ -x "$candidate" ]; then echo "$candidate"; return; fi
        done
    fi
    echo "$VENV/bin/python"
}
