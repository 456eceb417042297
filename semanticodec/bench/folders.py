"""Folders that hold what this package made: it empties these and no others, and takes none of it for a recording."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..errors import ConfigError

MARK = ".semanticodec-bench"
"""Name of a file that says so."""


def marked(folder: Path) -> Path:
    """Make a folder, if there is none, and say that what lies in it is no recording.

    Args:
        folder: those above it are made too.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("semanticodec bench made this folder, and may empty it.\n")
    return folder


def is_ours(folder: Path) -> bool:
    """Tell whether a folder has the mark.

    Args:
        folder: which need not be there.
    """
    return (folder / MARK).is_file()


def emptied(folder: Path) -> Path:
    """Make a folder anew, without anything that an earlier call put there.

    Args:
        folder: with the mark, empty, or not there.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder has something in it and was made by somebody else.
    """
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not is_ours(folder)):
            raise ConfigError(
                f"{folder} is there and was not made by semanticodec bench, which would have to empty it; "
                "choose another place, or take it away"
            )
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    return marked(folder)


def recordings(folder: Path) -> list[Path]:
    """Return the files of a folder and of those in it, sorted, but for folders with a mark below it.

    Args:
        folder: whose own mark does not count.

    Returns:
        Paths that begin with the folder's.
    """
    found = []
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_ours(Path(path, name))]
        found += [Path(path, name) for name in names]
    return sorted(found)
