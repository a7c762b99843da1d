"""The bridge to ComfyUI: memory, adapter bank, matching, folders. Beside `bases`, the only place that imports comfy."""
