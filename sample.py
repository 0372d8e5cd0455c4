"""Write images for prompts: python sample.py MODEL --prompt "…" --output DIR"""

import sys

from d2m_jax import command_line
from d2m_jax.commands.sample import main

if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:]))
