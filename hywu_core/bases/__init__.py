"""Base models that ComfyUI lacks, as ComfyUI-native models. Each subpackage imports the host; this file does not."""
