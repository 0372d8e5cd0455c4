"""The random numbers of toy models and their inputs. TOY_SEED gives others: what a test promises
holds for all of them (make test-elsewhere)."""

import os

import numpy as np

SEED = int(os.environ.get("TOY_SEED", "0"))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(SEED + seed)
