"""A file system whose files named poison kill the process that opens them, known to fsspec in every process.

What makes a decoder crash differs from one libsndfile to the next; SIGKILL does not.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import fsspec

SOURCE = """
import os, signal
from fsspec.implementations.local import LocalFileSystem

class Poison(LocalFileSystem):
    protocol = "poison"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("poison://"))

    def unstrip_protocol(self, name):
        return "poison://" + self._strip_protocol(name)

    def _open(self, path, *args, **kwargs):
        if "poison" in os.path.basename(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._open(path, *args, **kwargs)
"""


@contextlib.contextmanager
def known(folder: Path) -> Iterator[None]:
    """Let ``poison://`` be known here, and in the processes that are started meanwhile.

    Args:
        folder: new, for the plugin.
    """
    about = folder / "poisonfs-1.dist-info"
    about.mkdir(parents=True)
    (folder / "poisonfs.py").write_text(SOURCE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: poisonfs\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[fsspec.specs]\npoison = poisonfs:Poison\n")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, PYTHONPATH=path), mock.patch.object(sys, "path", [str(folder), *sys.path]):
        fsspec.register_implementation("poison", "poisonfs.Poison", clobber=True)
        try:
            yield
        finally:
            sys.modules.pop("poisonfs", None)
