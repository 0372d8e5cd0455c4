"""Train or distill a model: python train.py CONFIG.py --run_dir DIR"""

import sys

from d2m_jax import command_line
from d2m_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:]))
