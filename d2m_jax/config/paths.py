"""Where configs/ and teachers/ are that come with the package, and what is found from there."""

import os
from pathlib import Path

from d2m_jax.config.errors import ConfigError, suggestion

ROOT = Path(__file__).parents[2]  # of the repository, in a checkout
# A wheel has them inside the package (setup.py).
_INSTALLED = Path(__file__).parents[1] / "shipped"
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else ROOT


def shipped(path: str | Path) -> Path:
    """A path of what is there; where nothing is, and the package brings it (teachers/NAME,
    configs/NAME.py), of that."""
    path = Path(path).expanduser()
    brought = SHIPPED / path
    ours = path.parts[:1] in (("teachers",), ("configs",)) and brought.exists()
    return brought if ours and not os.path.lexists(path) else path


def _folders() -> list[Path]:
    """Where relative paths may start."""
    return list(dict.fromkeys((Path.cwd(), SHIPPED)))


def near_path(path: str | Path) -> str:
    """`, did you mean …?` where a file or folder of a name like that is beside it, in the shell's
    folder or in that of what comes with the package; else the empty string."""
    places = [folder / Path(path).expanduser() for folder in _folders()]
    folders = (place.parent for place in places if place.parent.is_dir())
    return suggestion(places[0].name, (p.name for folder in folders for p in folder.iterdir()))


def teacher_path(teacher: str, field: str = "teacher") -> Path:
    """Where the model directory of RunConfig.teacher (or another `field`) lies: a relative path
    starts at the shell's folder or, where nothing is there, at that of what comes with the package,
    which in a checkout is the repository's root. ConfigError if neither has it."""
    folders = _folders()
    places = [folder / Path(teacher).expanduser() for folder in folders]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise ConfigError(
            f"{field} = {teacher}: found nothing in {' nor in '.join(map(str, folders))}"
            f"{near_path(teacher)};"
            " expected a model directory: python convert_torch_weights.py SOURCE OUTPUT makes one"
            " of torch's files or of a repository of Hugging Face"
        )
    return found
