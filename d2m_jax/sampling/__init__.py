"""From noise and prompts to images."""
