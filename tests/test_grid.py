"""Grids and files of images."""

import io

import numpy as np
import pytest
from PIL import Image

from d2m_jax.config import ConfigError
from d2m_jax.grid import GAP, Images, grid, write


def plain(*levels: float, height: int = 72) -> np.ndarray:
    """Images of one shade each, wider than high by a half."""
    shape = (len(levels), height, height * 3 // 2, 3)
    return np.broadcast_to(np.float32(levels)[:, None, None, None], shape)


def test_grid_goes_row_by_row():
    pixels = np.asarray(grid(plain(0.0, 0.2, 0.4, 0.6, 0.8), columns=3))
    assert pixels.shape == (2 * 72 + GAP, 3 * 108 + 2 * GAP, 3)
    corners = pixels[:: 72 + GAP, :: 108 + GAP, 0]
    np.testing.assert_array_equal(
        corners, [[0, 51, 102], [153, 204, 255]]
    )  # an empty place is white
    assert (pixels[72 : 72 + GAP] == 255).all()


def test_grid_is_as_square_as_it_can():
    assert grid(plain(*[0.5] * 5)).size == (3 * 108 + 2 * GAP, 2 * 72 + GAP)
    assert grid(plain(0.5)).size == (108, 72)


def test_small_images_are_enlarged():
    assert grid(plain(0.5, 0.5, height=24), columns=2).size == (2 * 108 + GAP, 72)


def test_write_rounds_clips_and_replaces(tmp_path):
    write(plain(0.0, 1.0), tmp_path / "new")
    write(plain(-0.5, 0.5, 1.5), tmp_path / "new")
    files = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert files == ["0000.png", "0001.png", "0002.png", "grid.png"]
    levels = [int(np.asarray(Image.open(tmp_path / "new" / f))[0, 0, 0]) for f in files[:3]]
    assert levels == [0, 128, 255]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_not_written(tmp_path, bad):
    with pytest.raises(ConfigError, match="images: found NaN or infinity"):
        write(plain(0.5, bad), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_notebook_displays_them():
    images = plain(0.0, 0.2, 0.4).copy().view(Images)

    def shown(part):
        return np.asarray(Image.open(io.BytesIO(part._repr_png_())))

    np.testing.assert_array_equal(shown(images), np.asarray(grid(plain(0.0, 0.2, 0.4))))
    assert shown(images[1]).shape == (72, 108, 3) and (shown(images[1]) == 51).all()
    assert shown(images[:2, :40]).shape == (40, 2 * 108 + GAP, 3)
    for other in (images[0, 0], images[..., 0], images[:0], images.astype(np.float64)):
        assert other._repr_png_() is None


def test_they_are_pil_s_and_plain_arrays_too():
    images = plain(0.0, 0.2).copy().view(Images)
    assert [picture.size for picture in images.pil] == [(108, 72)] * 2
    assert images[1].pil.getpixel((0, 0)) == (51, 51, 51)
    assert isinstance(images, np.ndarray) and images.dtype == np.float32
    for computed in (images * 255, 1 - images, images.mean(axis=0), np.concatenate([images] * 2)):
        assert type(computed) is np.ndarray
    assert images.mean() == pytest.approx(0.1) and isinstance(images.max(), np.float32)
