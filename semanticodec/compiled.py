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
VARIABLE = "NUMBA_CACHE_DIR"


@functools.cache
def own_cache() -> None:
    """Let numba keep what it compiles in a folder that no other process uses.

    The first process that takes a folder compiles what it needs (librosa's pYIN: 25 s), later ones load.  It is to be
    called before packages are imported that numba compiles, and processes that compile are not to be forked.
    """
    given = os.environ.get(VARIABLE)
    try:
        home = Path(given).absolute() if given else Path.home() / HOME
    except RuntimeError:  # nobody's process: there is no home
        home = Path(tempfile.gettempdir(), "semanticodec-compiled")
    # The variable, not only its value in numba: that is read again whenever any of numba's variables has changed.
    os.environ[VARIABLE] = str(own_folder(home))
    import numba.core.config

    numba.core.config.reload_config()  # type: ignore[no-untyped-call]


def import_librosa() -> Any:
    """Import librosa after :func:`own_cache`; packages that import it themselves are to be imported after this."""
    own_cache()
    import librosa

    return librosa


def own_folder(home: Path) -> Path:
    """Return the first folder in ``home`` that no living process has; this one has it until it ends, however it ends.

    Where nothing can be written or locked in ``home``, it is a temporary folder.

    Args:
        home: made if there is none.
    """
    try:
        return next(folder for number in itertools.count() if _locked(folder := home / str(number)))
    except (ImportError, OSError):  # no locks here, or no disk
        temporary = tempfile.mkdtemp(prefix="semanticodec-compiled-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary)


def _locked(folder: Path) -> bool:
    """Lock a folder until this process ends, unless another has."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    # stays open: the system gives the lock back when the process ends
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return False
        raise
    return True
