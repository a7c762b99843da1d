"""Base models that ComfyUI lacks, as ComfyUI-native models."""
