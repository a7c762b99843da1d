#!/usr/bin/env bash
# Shows the pack at work, on the CPU, with nothing downloaded but the host: sets up, starts a real ComfyUI server on a free
# port, runs workflows/quickstart.json in it and saves the picture before and after to out/demo/. Then teaches the generator one
# new edit from eight pairs, and draws a contact sheet of more pictures and edits, the new one in its last row.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
bash "$ROOT/scripts/setup.sh"
"$(host_python)" "$ROOT/scripts/demo.py" --host "$HOST_DIR" --python "$(host_python)" --pack "$PACK_NAME" "$@"
export COMFYUI_DIR="$HOST_DIR"
echo "demo: teaching a new edit from eight pairs, a few minutes"
pairs="$ROOT/out/demo/sepia" taught="$ROOT/out/demo/taught"
"$(host_python)" "$ROOT/scripts/make_pocket_pairs.py" --edits sepia --count 8 --out "$pairs"
"$(host_python)" "$ROOT/scripts/teach.py" --cpu --pocket --generator "$ROOT/models/pocket-generator.safetensors" \
    --pairs "$pairs" --output "$taught" --steps 60 --batch 4
"$(host_python)" "$ROOT/scripts/contact_sheet.py" --taught "$taught/generator"
