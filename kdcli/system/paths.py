"""Folders: KDCLI_HOME, the data root, and the files shipped with the package."""

import os
import sys
from pathlib import Path


def home() -> Path:
    """KDCLI_HOME, else the user's cache folder: zoo, banks, downloads."""
    if given := os.environ.get("KDCLI_HOME"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "kdcli"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "kdcli"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kdcli"


def data_root(given: str | None = None) -> Path:
    """The folder of the data sets: `given`, else KDCLI_DATA, else `data` in `home()`."""
    return Path(given or os.environ.get("KDCLI_DATA") or home() / "data").expanduser()


def shipped(kind: str) -> Path:
    """The folder of shipped `recipes` or `zoo` cards: in an installed wheel, or next to the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "_shipped" / kind
    return inside if inside.is_dir() else package.parent / kind
