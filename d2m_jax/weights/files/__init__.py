"""Files as they lie on a disk or at Hugging Face, whatever model they hold."""
