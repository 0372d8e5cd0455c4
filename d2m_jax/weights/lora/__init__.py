"""LoRA files of all tools, merged into a transformer."""
