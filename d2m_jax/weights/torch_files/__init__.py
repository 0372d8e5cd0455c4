"""Models in torch's files: in, out, and the folder of a diffusers pipeline."""
