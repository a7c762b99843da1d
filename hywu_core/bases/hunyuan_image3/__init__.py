"""HunyuanImage-3.0-Instruct as a native model of the host."""
