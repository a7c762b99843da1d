#!/usr/bin/env bash
# Shows the pack at work, on the CPU, with nothing downloaded but the host: sets up, starts a real ComfyUI server on a free
# port, runs workflows/quickstart.json in it and saves the picture before and after to out/demo/.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
bash "$ROOT/scripts/setup.sh"
exec "$(host_python)" "$ROOT/scripts/demo.py" --host "$HOST_DIR" --python "$(host_python)" --pack "$PACK_NAME" "$@"
