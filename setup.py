"""What pyproject.toml cannot say: a wheel brings configs/ and teachers/, as d2m_jax/shipped/."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithShipped(build_py):
    """The package's files, and those."""

    def run(self) -> None:
        """Copy them."""
        super().run()
        if self.editable_mode:  # a checkout has them at its root
            return
        place = Path(self.build_lib) / "d2m_jax" / "shipped"
        shutil.rmtree(place, ignore_errors=True)  # of an earlier build
        for folder in ("configs", "teachers"):
            shutil.copytree(folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": WithShipped})
