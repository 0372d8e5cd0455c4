"""FLUX.1 from torch's files and back: python convert_torch_weights.py SOURCE OUTPUT"""

import sys

from d2m_jax import command_line
from d2m_jax.commands.convert import main

if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:]))
