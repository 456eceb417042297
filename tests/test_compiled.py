"""Compiled functions: one folder per living process, free again when that is killed."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from semanticodec.compiled import HOME, VARIABLE, own_folder

HOLD = """
import sys
from collections.abc import Iterator
from pathlib import Path
from semanticodec.compiled import own_folder
print(own_folder(Path(sys.argv[1])).name, flush=True)
sys.stdin.read()
"""
SCORE = """
import numpy as np
from semanticodec.bench.metrics import METRICS
from semanticodec.bench.sounds import Sound
tone = Sound(np.sin(2 * np.pi * 110 / 16_000 * np.arange(16_000)))
print(f"{np.nanmedian(tone.pitch[0]):.1f} {METRICS['visqol'].value(tone, tone)[0]:.1f}")
"""
IMPORT = """
import os
from semanticodec.compiled import import_librosa
librosa = import_librosa()
from numba import config
os.environ["NUMBA_OPT"] = "2"  # a change of any variable lets numba read all of them again
config.reload_config()
print(config.CACHE_DIR)
"""


@contextlib.contextmanager
def holding(home: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a process that takes a folder and keeps it; yield it and the folder's name."""
    command = [sys.executable, "-c", HOLD, home]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_living_processes_share_no_folder_and_a_killed_one_leaves_its_own(tmp_path: Path) -> None:
    with holding(tmp_path) as (first, name), holding(tmp_path) as (_, other):
        assert (name, other) == ("0", "1")
        first.kill()
        first.wait()
        with holding(tmp_path) as (_, third):
            assert third == "0"


def test_a_home_that_cannot_be_written_is_no_end(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    folder = own_folder(tmp_path / "home")
    assert not any(folder.iterdir())
    folder.rmdir()


@pytest.mark.parametrize("given", [False, True])
def test_numba_keeps_to_the_folder(tmp_path: Path, given: bool) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), VARIABLE: str(tmp_path / "given")}
    if not given:
        del environment[VARIABLE]
    done = subprocess.run([sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == (tmp_path / "given" if given else tmp_path / HOME) / "0"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_that_were_killed_while_they_compiled_go_on(tmp_path: Path) -> None:
    """Killed at five moments of 25 s, always two at once; nothing goes beside the package."""
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop(VARIABLE, None)

    command = [sys.executable, "-c", SCORE]

    def two(seconds: float | None) -> list[str]:
        """Start two processes, kill them after a while, return what they said."""
        with contextlib.ExitStack() as stack:
            start = functools.partial(subprocess.Popen, command, env=environment, stdout=subprocess.PIPE, text=True)
            processes = [stack.enter_context(start()) for _ in range(2)]
            try:
                processes[0].wait(seconds)
            except subprocess.TimeoutExpired:
                for process in processes:
                    process.kill()
            said = [process.communicate()[0].strip() for process in processes]
            assert all(process.returncode in (0, -signal.SIGKILL) for process in processes)
            return said

    for seconds in (6, 9, 12, 15, 18):
        two(seconds)
    for said in two(None):
        assert list(map(float, said.split())) == pytest.approx([110, 5.0], rel=0.07)
    assert {path.name for path in (tmp_path / HOME).iterdir()} == {"0", "1"}
    assert list((tmp_path / HOME / "0").rglob("*.nbc"))
