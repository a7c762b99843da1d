"""A LoRA and a MODEL of the host: matching, applying, files, charts."""
