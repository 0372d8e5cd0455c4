"""The text encoder of the embedded task: fixed word vectors, mixed with their neighbours'."""

import hashlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from d2m_jax.config import ConfigError, WordsConfig, suggestion

NEIGHBOUR = 0.5  # weight of each neighbour's rotated vector in a token


class Words:
    """Captions to `txt` and `y`, in the places of T5 and CLIP. Nothing here trains.

    Word i of the vocabulary has id i + 1, padding id 0. A word's vector is of random signs. Vectors
    and rotations come from a hash, not a generator, so that no release of NumPy can change a
    trained model's words; and from the word itself, so that they do not depend on the vocabulary.
    """

    padding = 0  # its id

    def __init__(self, config: WordsConfig):
        self.config = config
        self.index = {word: i + 1 for i, word in enumerate(config.vocabulary)}
        vectors = [_signs(config, word) for word in config.vocabulary]
        self.vectors = np.stack([np.zeros(config.dim, np.float32), *vectors])

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
        before = self._rotate("before", padded[:, :-2])
        after = self._rotate("after", padded[:, 2:])
        real = (ids > 0)[..., None]
        txt = real * (vectors + NEIGHBOUR * (before + after)) / (1 + 2 * NEIGHBOUR**2) ** 0.5
        # a mean of n independent vectors has variance 1 / n, hence the root
        y = txt.sum(axis=1) / jnp.sqrt(jnp.maximum(real.sum(axis=1), 1))
        return txt, y

    def _rotate(self, side: str, vectors: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """An orthogonal map of its own for each side: a permutation with signs."""
        order = np.argsort(np.frombuffer(_bytes(self.config, f"/{side}", 8), "<u8"), kind="stable")
        return vectors[..., order] * _signs(self.config, f"/{side} signs")


def _signs(config: WordsConfig, name: str) -> Float[np.ndarray, " d"]:
    return np.where(np.frombuffer(_bytes(config, name, 1), np.uint8) & 1, 1, -1).astype(np.float32)


def _bytes(config: WordsConfig, name: str, each: int) -> bytes:
    """`each` bytes per dimension that depend on the seed and the name alone."""
    return hashlib.shake_256(f"{config.seed}/{name}".encode()).digest(each * config.dim)
