"""What training, sampling and reports want of data, whatever it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import PyTree

from d2m_jax.config import AutoencoderConfig, PixelsConfig

Canvas = PixelsConfig | AutoencoderConfig  # what knows an image's height and width
# Draws of what trains, draws that judge the training, and draws of what never trains. Where every
# sample is its own, as in images, the two latter are one.
Split = Literal["train", "validation", "held_out"]


@runtime_checkable
class Tokenizer(Protocol):
    """What turns captions into arrays with the batch in front."""

    def ids(self, captions: list[str]) -> PyTree: ...


@runtime_checkable
class Batches(Protocol):
    """Batches without end; get_state and set_state resume exactly.

    A batch is either raw, {"image": uint8 [b, H, W, 3], "text": what the tokenizer makes of the
    captions}, or encoded (Encoders.encode): {"latents": [b, rows, columns, k] float32, "txt": [b,
    l, e], "y": [b, v]}, and "text_length" [b], the text tokens that are no padding, where that is
    known. All of its images have one size, which may be another in the next batch,
    and is the same on all processes.
    """

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def __next__(self) -> dict[str, Any]: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@runtime_checkable
class Prompt(Protocol):
    """What is asked of a model."""

    @property
    def caption(self) -> str: ...

    @property
    def category(self) -> str: ...


@dataclass(frozen=True)
class Asked:
    """A prompt of which no more is known."""

    caption: str
    category: str = "prompts"


@runtime_checkable
class Data(Protocol):
    """Captioned images."""

    @property
    def encoded(self) -> bool:
        """Whether its batches are encoded: what trains on them needs no encoders."""
        ...

    @property
    def tells_padding(self) -> bool:
        """Whether its batches, once encoded, have "text_length"."""
        ...

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width in pixels of the images of a batch, of all kinds of batches: each is a
        program of its own."""
        ...

    def fingerprint(self) -> str:
        """Another one when the samples are others, though the config is the same."""
        ...

    def vocabulary(self) -> tuple[str, ...]:
        """Every word of its captions, for a model that reads words."""
        ...

    def batches(
        self,
        tokenizer: Tokenizer,
        size: int,
        seed: int = 0,
        split: Split = "train",
        rows: slice = slice(None),
    ) -> Batches:
        """Of every batch of `size` only `rows` are drawn: what a process of many needs."""
        ...

    def prompts(self, count: int, held_out: bool = False) -> Sequence[Prompt]:
        """At most so many prompts to draw samples of, always the same; held_out: of what never
        trains."""
        ...
