"""What data a run has: the embedded task, captioned images, or a cache of encoded ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from d2m_jax.config.errors import check, check_number, check_whole
from d2m_jax.config.fields import Config


@dataclass(frozen=True)
class IconsConfig(Config):
    """The embedded task of data/icons.py."""

    task: Literal["single", "scenes"] = "scenes"  # one pictogram, or one to several
    pictograms: int = 2048  # the first of data/pictograms.npz
    seed: int = 0  # of the scenes
    train_size: int = 10_000_000  # scenes per epoch: each is rendered from its index
    workers: int = 0  # grain worker processes; 0 renders in threads of this process
    kind: Literal["icons"] = "icons"

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, 1, "pictograms", "train_size")
        check_whole(self, 0, "seed", "workers")


@dataclass(frozen=True)
class ImagesConfig(Config):
    """Captioned images on disk or in an object store, decoded while training goes on."""

    # Path or pattern (a folder of images, tars, parquet files, ArrayRecord; data/sources) → how
    # often one pass over the data sees each of its images.
    sources: Mapping[str, float] = field(default_factory=dict)
    # Buckets have about as many pixels as a square of one of these sides.
    resolutions: tuple[int, ...] = (1024,)
    aspect_ratio: float = 2.0  # of the longest bucket; 1: squares alone
    template: str = "{caption}"  # what a model reads of a caption
    caption_dropout: float = 0.0  # the share of captions that are left empty in training
    background: tuple[int, ...] = (255, 255, 255)  # under what is transparent
    max_pixels: int = 100_000_000  # an image of more is not decoded
    max_bad: int = 100  # samples that one process may leave out before it stops
    validation: int = 256  # samples that never train
    prompts: str | None = None  # a file of prompts for sample grids; None: captions of validation
    index: str | None = None  # folder for what is known of the sources; None: beside them
    workers: int = 0  # grain worker processes; 0 decodes in threads of this process
    kind: Literal["images"] = "images"

    def __post_init__(self):
        super().__post_init__()
        check(len(self.sources) > 0, "ImagesConfig.sources: expected at least one path, found none")
        for path, weight in self.sources.items():
            positive = 0 < weight < float("inf")
            check(positive, f"ImagesConfig.sources[{path!r}] = {weight}: expected more than 0")
        check(len(self.resolutions) > 0, "ImagesConfig.resolutions: expected at least one")
        check(
            all(side >= 1 for side in self.resolutions),
            f"ImagesConfig.resolutions = {self.resolutions}: expected pixels, at least 1",
        )
        check_number(self, "aspect_ratio", least=1)
        check(
            "{caption}" in self.template,
            f"ImagesConfig.template = {self.template!r}: expected {{caption}} in it",
        )
        check(
            0 <= self.caption_dropout <= 1,
            f"ImagesConfig.caption_dropout = {self.caption_dropout}: expected 0 to 1",
        )
        check(
            len(self.background) == 3 and all(0 <= value <= 255 for value in self.background),
            f"ImagesConfig.background = {self.background}: expected red, green, blue from 0 to 255",
        )
        check_whole(self, 1, "max_pixels")
        check_whole(self, 0, "max_bad", "validation", "workers")


@dataclass(frozen=True)
class CacheConfig(Config):
    """Latents and text features that were made before (python -m d2m_jax.data.cache, or
    d2m_jax.data.generate): neither T5 nor the autoencoder is loaded to train on them."""

    path: str = ""  # its folder; MLPerf's preprocessed FLUX.1 folder and NVIDIA's tars of it too
    latents: Literal["mean", "sampled"] = "mean"  # of what the autoencoder says of an image
    caption_dropout: float = 0.0  # the share of captions that are left empty in training
    max_bad: int = 100  # samples that one process may leave out before it stops
    validation: int = 256  # samples that never train
    prompts: str | None = None  # a file of prompts for sample grids; None: captions of validation
    index: str | None = None  # folder for what is known of NVIDIA's tars; None: beside them
    workers: int = 0  # grain worker processes; 0 reads in threads of this process
    kind: Literal["cache"] = "cache"

    def __post_init__(self):
        super().__post_init__()
        check(self.path != "", "CacheConfig.path: expected the folder of a cache, found nothing")
        check(
            0 <= self.caption_dropout <= 1,
            f"CacheConfig.caption_dropout = {self.caption_dropout}: expected 0 to 1",
        )
        check_whole(self, 0, "max_bad", "validation", "workers")


DataConfig = IconsConfig | ImagesConfig | CacheConfig
