"""The checks of scripts/gpu_check.py, by what they are of. Each gets the machine and returns numbers."""
