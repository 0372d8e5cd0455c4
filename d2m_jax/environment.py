"""Imported first: where the packages are not installed, one line says so, and Python ends."""

import importlib.util
import sys

found = None
if sys.version_info < (3, 11):  # noqa: UP036 (another Python than the one that pip asked for)
    found = f"is Python {sys.version.split()[0]}"
elif absent := [name for name in ("jax", "rich", "tyro") if importlib.util.find_spec(name) is None]:
    found = f"lacks {' and '.join(absent)}"
if found is not None:
    print(
        f"error: {sys.executable} {found}, expected an environment with d2m_jax: source"
        " .venv/bin/activate (make demo makes it), or pip install -e . with Python 3.11 or newer",
        file=sys.stderr,
    )
    raise SystemExit(2)
