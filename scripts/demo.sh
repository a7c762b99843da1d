#!/usr/bin/env bash
# Shows the pack at work, on the CPU, with nothing downloaded but the host: sets up, starts a real ComfyUI server on a free
# port, runs workflows/quickstart.json in it and saves the picture before and after to out/demo/, with a contact sheet of more
# pictures and edits.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
bash "$ROOT/scripts/setup.sh"
"$(host_python)" "$ROOT/scripts/demo.py" --host "$HOST_DIR" --python "$(host_python)" --pack "$PACK_NAME" "$@"
COMFYUI_DIR="$HOST_DIR" "$(host_python)" "$ROOT/scripts/contact_sheet.py"
