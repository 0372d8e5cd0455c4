"""The text encoder of the embedded task: fixed word vectors, mixed with their neighbours'."""

import hashlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from d2m_jax.config import ConfigError, WordsConfig, suggestion

NEIGHBOUR = 0.5  # weight of each neighbour's rotated vector in a token


class Words:
    """Captions to `txt` and `y`, in the places of T5 and CLIP. Nothing here trains.

    Word i of the vocabulary has id i + 1, padding id 0.
    """

    def __init__(self, config: WordsConfig):
        self.config = config
        self.index = {word: i + 1 for i, word in enumerate(config.vocabulary)}
        shape = (config.dim, config.dim)
        # seeded by the word itself, so that a vector does not depend on the rest of the vocabulary
        vectors = [_normal(config.seed, word, (config.dim,)) for word in config.vocabulary]
        self.vectors = np.stack([np.zeros(config.dim, np.float32), *vectors])
        self.before = np.linalg.qr(_normal(config.seed, "/before", shape))[0]
        self.after = np.linalg.qr(_normal(config.seed, "/after", shape))[0]

    def ids(self, captions: list[str]) -> Int[np.ndarray, "b l"]:
        """Token ids; ConfigError names the unknown words or the caption that is too long."""
        rows = [caption.lower().split() for caption in captions]
        unknown = dict.fromkeys(word for row in rows for word in row if word not in self.index)
        if unknown:
            found = "; ".join(f"{word!r}{suggestion(word, self.index)}" for word in unknown)
            raise ConfigError(
                f"caption: unknown word {found} (expected words of this model's vocabulary,"
                f" such as {', '.join(self.config.vocabulary[-3:])})"
            )
        ids = np.zeros((len(rows), self.config.length), np.int32)
        for i, row in enumerate(rows):
            if len(row) > self.config.length:
                raise ConfigError(
                    f"caption {captions[i]!r}: {len(row)} words,"
                    f" expected at most {self.config.length}"
                )
            ids[i, : len(row)] = [self.index[word] for word in row]
        return ids

    def __call__(
        self, ids: Int[Array | np.ndarray, "b l"]
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b d"]]:
        """Token vectors and their pooled vector, of about unit variance; padding is zero."""
        vectors = jnp.asarray(self.vectors)[ids]
        padded = jnp.pad(vectors, ((0, 0), (1, 1), (0, 0)))
        neighbours = padded[:, :-2] @ self.before + padded[:, 2:] @ self.after
        real = (ids > 0)[..., None]
        txt = real * (vectors + NEIGHBOUR * neighbours) / (1 + 2 * NEIGHBOUR**2) ** 0.5
        # a mean of n independent vectors has variance 1 / n, hence the root
        y = txt.sum(axis=1) / jnp.sqrt(jnp.maximum(real.sum(axis=1), 1))
        return txt, y


def _normal(seed: int, name: str, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Standard normal numbers that depend on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return generator.standard_normal(shape, np.float32)
