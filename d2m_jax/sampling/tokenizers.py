"""Prompts to token ids, by transformers' tokenizers of CLIP and T5 (no torch needed)."""

from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int

from d2m_jax.config import ConfigError, PromptsConfig


class Tokenizers:
    """The tokenizers in the folders tokenizer (CLIP) and tokenizer_2 (T5) of a FluxPipeline."""

    def __init__(self, folder: str, config: PromptsConfig):
        self.folder, self.config = Path(folder), config

    @cached_property
    def loaded(self) -> dict:
        """Both, by the names of their encoders. ConfigError where they cannot be read."""
        # It takes a second, and only those who have prompts need it.
        from transformers import AutoTokenizer

        found = {}
        for name, part in (("clip", "tokenizer"), ("t5", "tokenizer_2")):
            try:
                found[name] = AutoTokenizer.from_pretrained(self.folder / part)
            except Exception as error:  # each tokenizer has its own
                line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
                where = self.folder / part
                raise ConfigError(f"{where}: expected a tokenizer, found none ({line})") from None
        return found

    def ids(
        self, captions: list[str], length: int | None = None
    ) -> dict[str, Int[np.ndarray, "b l"]]:
        """Ids for CLIP and T5, padded and cut to their lengths; T5's is `length` where given."""
        return {
            name: np.asarray(
                tokenizer(
                    captions,
                    padding="max_length",
                    max_length=self._length(name, length),
                    truncation=True,
                    return_tensors="np",
                ).input_ids,
                np.int32,
            )
            for name, tokenizer in self.loaded.items()
        }

    def lost(self, captions: list[str], length: int | None = None) -> dict[str, dict[int, str]]:
        """What `ids` cuts off: by encoder, the rest of each caption that is too long, by its
        index."""
        found: dict[str, dict[int, str]] = {}
        for name, tokenizer in self.loaded.items():
            # The last id that is kept ends the text, whatever was cut.
            kept = self._length(name, length) - 1
            whole = tokenizer(captions, truncation=False, verbose=False).input_ids
            found[name] = {
                i: tokenizer.decode(ids[kept:], skip_special_tokens=True)
                for i, ids in enumerate(whole)
                if len(ids) > kept + 1
            }
        return found

    def _length(self, name: str, length: int | None) -> int:
        if name == "clip":
            return self.config.clip.max_position_embeddings
        return self.config.length if length is None else length
