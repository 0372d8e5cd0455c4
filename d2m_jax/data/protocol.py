"""What training, sampling and reports want of data, whatever it is."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import PyTree

from d2m_jax.config import AutoencoderConfig, PixelsConfig

Canvas = PixelsConfig | AutoencoderConfig  # what knows an image's height and width
# Draws of what trains, draws that judge the training, and draws of what never trains.
Split = Literal["train", "validation", "held_out"]


@runtime_checkable
class Tokenizer(Protocol):
    """What turns captions into arrays with the batch in front."""

    def ids(self, captions: list[str]) -> PyTree: ...


@runtime_checkable
class Batches(Protocol):
    """Batches without end, {"image": uint8 [b, h, w, 3], "text": what the tokenizer makes of their
    captions}; get_state and set_state resume exactly."""

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


@runtime_checkable
class Data(Protocol):
    """Captioned images."""

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
        """So many prompts to draw samples of, always the same; held_out: of what never trains."""
        ...
