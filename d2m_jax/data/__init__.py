"""Where examples come from: rendered scenes, shards and cached latents, read through grain."""
