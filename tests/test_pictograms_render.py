"""examples/pictograms: which icons of the package become pictograms."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest

from d2m_jax.config import ConfigError
from d2m_jax.data import pictograms

pytest.importorskip("resvg_py")
from examples.pictograms import render

SHAPES = {
    "ring": '<circle cx="12" cy="12" r="8" fill="none" stroke="black" stroke-width="4"/>',
    "cross": '<path d="M9 1h6v8h8v6h-8v8h-6v-8h-8v-6h8z"/>',
    "hill": '<path d="M1 23L12 1L23 23z"/>',
}


def package(path, icons, prefix="mdi", brands=()):
    """A package of Iconify's, as `npm pack` leaves it."""
    content = {
        "icons": {"prefix": prefix, "icons": icons},
        "metadata": {"categories": {"Brand / Logo": list(brands)}},
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, value in content.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_plain_names_alone(tmp_path):
    names = [
        "ring",
        "ring-outline",
        "old",
        "dice-6",
        "alpha-a",
        "a-b-c-d",
        "red",
        "acme",
        "tea-pot",
    ]
    icons = {name: {"body": SHAPES["ring"]} for name in names}
    icons["old"]["hidden"] = True
    found = render.read(package(tmp_path / "a.tgz", icons, brands=["acme"]))
    assert set(found) == {"ring", "tea-pot"}


def test_other_files_are_told(tmp_path):
    other = package(tmp_path / "a.tgz", {}, prefix="noto")
    with pytest.raises(ConfigError, match="found the set noto, expected mdi"):
        render.read(other)
    (tmp_path / "b.tgz").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"b\.tgz: no package of an Iconify set"):
        render.read(tmp_path / "b.tgz")


def test_masks_are_centred_and_as_large_as_they_fit():
    mask = render.draw('<path d="M3 4h8v16h-8z"/>')
    expected = np.zeros((14, 14), bool)
    expected[:, 3:10] = True
    np.testing.assert_array_equal(mask, expected)
    full, thin = '<path d="M0 0h24v24h-24z"/>', '<path d="M0 0h24v2h-24z"/>'
    assert render.draw(full) is None and render.draw(thin) is None and render.draw("") is None


def test_what_looks_the_same_is_left_out(tmp_path, monkeypatch):
    moved = '<path d="M8 0h6v8h8v6h-8v8h-6v-8h-8v-6h8z"/>'
    shapes = {"moved-cross": moved, "ring-again": SHAPES["ring"]} | SHAPES
    icons = {name: {"body": body} for name, body in shapes.items()}
    output = tmp_path / "p.npz"
    render.main([str(package(tmp_path / "a.tgz", icons)), "--output", str(output)])
    monkeypatch.setattr(pictograms, "FILE", output)
    pictograms.lexicon.cache_clear()
    pictograms._all.cache_clear()
    try:
        known = pictograms.lexicon(3)
        in_order = sorted(SHAPES, key=lambda name: hashlib.sha256(name.encode()).digest())
        assert list(known.names) == in_order
        for name, mask in zip(known.names, known.masks, strict=True):
            np.testing.assert_array_equal(mask, render.draw(SHAPES[name]))
        with pytest.raises(ConfigError, match="at most 3,"):
            pictograms.lexicon(4)
    finally:
        pictograms.lexicon.cache_clear()
        pictograms._all.cache_clear()
