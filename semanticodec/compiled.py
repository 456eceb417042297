"""Packages whose functions numba compiles when they are first used, each process with a folder of its own for them.

Numba keeps what it compiled beside the package, for all processes.  Two that compile at once leave there a function of
one and a caller of it by the other, which knows it by another name: that ends every process that loads them by a
segmentation fault.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

HOME = Path(".cache", "semanticodec", "compiled")
"""Where the folders are, below the user's home, unless ``NUMBA_CACHE_DIR`` says where."""


@functools.cache
def import_librosa() -> Any:
    """Import librosa; what it compiles goes to a folder that no other process uses, but those forked from this one.

    The first process that takes a folder compiles for about 25 s, later ones load.  Packages that import librosa
    themselves are to be imported after this.
    """
    from numba import config

    folder = own_folder(Path(os.environ.get("NUMBA_CACHE_DIR") or HOME))
    config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]  # it is set from a loop
    import librosa

    return librosa


def own_folder(home: Path) -> Path:
    """Return the first folder in ``home`` that no living process has; this one has it until it ends, however it ends.

    Where nothing can be written or locked in ``home``, it is a temporary folder.

    Args:
        home: relative to the user's; made if there is none.
    """
    try:
        import fcntl

        for number in itertools.count():
            folder = Path.home() / home / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            # stays open: the system gives the lock back when the process ends
            descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
            else:
                return folder
        raise AssertionError("there is always a next number")
    except (ImportError, OSError, RuntimeError):  # no locks here, no disk, no home
        temporary = tempfile.mkdtemp(prefix="semanticodec-compiled-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary)
