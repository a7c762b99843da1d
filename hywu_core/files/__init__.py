"""Files in and out: safetensors written atomically and read with typed errors, generator checkpoints, LoRA files."""
