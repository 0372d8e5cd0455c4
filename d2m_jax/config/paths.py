"""Where the repository is, and what is found from there."""

from pathlib import Path

from d2m_jax.config.errors import ConfigError

ROOT = Path(__file__).parents[2]


def teacher_path(teacher: str, field: str = "teacher") -> Path:
    """Where the model directory of RunConfig.teacher (or another `field`) lies: a relative path
    starts at the shell's folder or, where nothing is there, at the repository's root. ConfigError
    if neither has it."""
    folders = dict.fromkeys((Path.cwd(), ROOT))
    places = [folder / Path(teacher).expanduser() for folder in folders]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise ConfigError(
            f"{field} = {teacher}: found nothing in {' nor in '.join(map(str, folders))}; expected"
            " a model directory: python convert_torch_weights.py SOURCE OUTPUT makes one of torch's"
            " files or of a repository of Hugging Face"
        )
    return found
