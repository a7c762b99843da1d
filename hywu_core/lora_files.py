"""LoRA files in and out; the code is in `files.lora_files`."""

from .files.lora_files import from_state_dict, load_lora, save_lora, to_peft_state_dict, to_state_dict

__all__ = ["from_state_dict", "load_lora", "save_lora", "to_peft_state_dict", "to_state_dict"]
