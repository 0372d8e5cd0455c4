"""Prompts to token ids, by transformers' tokenizers of CLIP and T5 (no torch needed)."""

import threading
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from d2m_jax import quiet
from d2m_jax.config import ConfigError, PromptsConfig, check

SPIECE = "spiece.model"
# Any of these sets of files is the vocabulary of CLIP or T5.
VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {SPIECE})
# A tokenizer of transformers remembers how the last call cut and padded, for all threads.
_one_at_a_time = threading.Lock()
_reading = threading.Lock()  # transformers cannot be imported by two threads at once


class Tokenizers:
    """The tokenizers in the folders tokenizer (CLIP) and tokenizer_2 (T5) of a FluxPipeline.

    Threads may share them: those that read data wait for nobody.
    """

    def __init__(self, folder: str, config: PromptsConfig):
        self.folder, self.config = Path(folder), config

    @cached_property
    def loaded(self) -> dict:
        """Both, by the names of their encoders; they only ever cut and pad to the config's lengths.
        ConfigError where they cannot be read."""
        found = self._read()
        self._ids(found, [""], None)  # sets them to do so before any thread has them
        return found

    @cached_property
    def _called_otherwise(self) -> dict:
        """The same once more, to be called otherwise under the lock."""
        return self._read()

    def _read(self) -> dict:
        with _reading:
            clip, t5 = tokenizer_classes()
            # Named as a FluxPipeline does, for tokenizer.json alone does not say how to pad.
            kinds = {"clip": (clip, "tokenizer"), "t5": (t5, "tokenizer_2")}
            return {name: _load(kind, self.folder / part) for name, (kind, part) in kinds.items()}

    def ids(
        self, captions: list[str], length: int | None = None
    ) -> dict[str, Int[np.ndarray, "b l"]]:
        """Ids for CLIP and T5, padded and cut to their lengths; T5's is `length` where given."""
        if length in (None, self.config.length):
            return self._ids(self.loaded, captions, None)
        with _one_at_a_time:
            return self._ids(self._called_otherwise, captions, length)

    def _ids(
        self, tokenizers: dict, captions: list[str], length: int | None
    ) -> dict[str, Int[np.ndarray, "b l"]]:
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
            for name, tokenizer in tokenizers.items()
        }

    @property
    def padding(self) -> int:
        """T5's id of padding."""
        return self.loaded["t5"].pad_token_id

    def lengths(self, ids: dict[str, Int[np.ndarray, "b l"]]) -> Int[np.ndarray, " b"]:
        """How many of T5's ids are no padding."""
        return (ids["t5"] != self.padding).sum(1)

    def lost(self, captions: list[str], length: int | None = None) -> dict[str, dict[int, str]]:
        """What `ids` cuts off: by encoder, the rest of each caption that is too long, by its
        index."""
        found: dict[str, dict[int, str]] = {}
        with _one_at_a_time:
            for name, tokenizer in self._called_otherwise.items():
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


def clip_tokenizer(folder: Path) -> Any:
    """That of a CLIPModel's folder. ConfigError where it cannot be read."""
    return _load(tokenizer_classes()[0], folder)


def tokenizer_classes() -> tuple[Any, Any]:
    """CLIPTokenizer and T5Tokenizer of transformers, imported by those alone who need them: it
    takes a second."""
    with quiet.without("transformers", "PyTorch was not found"):
        from transformers import CLIPTokenizer, T5Tokenizer
    return CLIPTokenizer, T5Tokenizer


def _load(kind: Any, folder: Path) -> Any:
    files = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    whole = any(names <= files for names in VOCABULARIES)
    check(whole, f"{folder}: expected a tokenizer (tokenizer.json), found none")
    if "tokenizer.json" not in files and SPIECE in files and not find_spec("sentencepiece"):
        raise ConfigError(
            f"{folder}: {SPIECE} without tokenizer.json needs a package that is not here: pip"
            " install sentencepiece protobuf"
        )
    try:
        return kind.from_pretrained(folder)
    except Exception as error:  # each tokenizer has its own
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ConfigError(f"{folder}: the tokenizer cannot be read ({line})") from None
