"""From a trained adapter to a plain LoRA that any server loads."""
