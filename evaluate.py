"""Evaluate a model: python evaluate.py COMMAND MODEL"""

import sys

from d2m_jax import command_line
from d2m_jax.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:]))
