"""Optional packages: which are missing, and how they are installed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec


def missing_packages(names: Iterable[str]) -> list[str]:
    """Return those of `names` that cannot be imported."""
    return [name for name in names if find_spec(name) is None]


def install_command(extra: str | None) -> str:
    """Return the command that installs an extra of this distribution."""
    return f"pip install 'compression-manager[{extra}]'"
