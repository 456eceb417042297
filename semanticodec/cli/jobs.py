"""What a command works through: inputs and their outputs, progress, and how failures are told."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import typer
from rich.console import Console
from rich.progress import Progress

from ..errors import AudioError, SemantiCodecError

T = TypeVar("T")

ENDING = ".scodec"
FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}
"""Sound files that folders are searched for, and that can be written."""


class Unprompted(StrEnum):
    """What guidance steers away from where nothing else is said."""

    zeros = "zeros"
    negative_prompt = "negative_prompt"


class Precision(StrEnum):
    """Floating-point types of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class Job:
    """One input and its output; None is the standard input or output."""

    source: Path | None
    target: Path | None

    @property
    def label(self) -> str:
        """The name of the input in messages."""
        return "standard input" if self.source is None else str(self.source)

    def check_target(self, force: bool) -> None:
        """Refuse to overwrite what is there, unless that was asked for."""
        if self.target is not None and self.target.exists() and not force:
            raise FileExistsError(errno.EEXIST, "exists; --force overwrites it", str(self.target))

    @property
    def sound_format(self) -> str:
        """The format of the sound file to write."""
        ending = ".wav" if self.target is None else self.target.suffix.lower()
        if ending not in FORMATS:
            raise AudioError(f"cannot write {self.target}: its ending must be one of {', '.join(FORMATS)}")
        return FORMATS[ending]

    @contextlib.contextmanager
    def open_source(self) -> Iterator[BinaryIO]:
        """Open the input; it can be seeked: a pipe is kept on disk."""
        if self.source is not None:
            with self.source.open("rb") as file:
                yield file
            return
        stdin = typer.get_binary_stream("stdin")
        if stdin.seekable() and stdin.tell() == 0:
            yield stdin
            return
        with tempfile.TemporaryFile() as spool:
            shutil.copyfileobj(stdin, spool)
            spool.seek(0)
            yield spool

    @contextlib.contextmanager
    def open_target(self) -> Iterator[BinaryIO]:
        """Open what becomes the output once it is complete: nothing half-written is left by an error."""
        if self.target is None:
            with tempfile.TemporaryFile() as file:
                yield file
                file.seek(0)
                stdout = typer.get_binary_stream("stdout")
                shutil.copyfileobj(file, stdout)
                stdout.flush()
            return
        self.target.parent.mkdir(parents=True, exist_ok=True)
        part = self.target.with_name(self.target.name + ".part")
        try:
            with part.open("w+b") as file:
                yield file
            part.replace(self.target)
        finally:
            part.unlink(missing_ok=True)


def find(inputs: Sequence[str], endings: tuple[str, ...]) -> list[tuple[Path | None, Path]]:
    """Return every input file (None: the standard input) and the folder that its output path is relative to."""
    found: list[tuple[Path | None, Path]] = []
    for name in inputs:
        if name == "-":
            if len(inputs) > 1:
                raise typer.BadParameter("the standard input goes alone")
            return [(None, Path())]
        root = Path(name)
        if not root.is_dir():
            found.append((root, root.parent))
            continue
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in endings and file.is_file())
        if not files:
            raise FileNotFoundError(errno.ENOENT, f"no {', '.join(endings)} in this folder", name)
        found += [(file, root) for file in files]
    return found


def plan(inputs: Sequence[str], out: str | None, endings: tuple[str, ...], ending: str) -> list[Job]:
    """Pair every input file with its output; folders are searched, and their tree is mirrored."""
    found = find(inputs, endings)
    into = out is not None and out != "-" and (out.endswith(os.sep) or Path(out).is_dir())
    alone = len(inputs) == 1 and not Path(inputs[0]).is_dir()
    if found[0][0] is None and into:
        raise typer.BadParameter("the standard input has no name to use in a folder", param_hint="--out")
    if out == "-" and len(found) > 1:
        raise typer.BadParameter(f"{len(found)} files cannot go through one pipe", param_hint="--out")
    if out and not alone and not into and Path(out).suffix.lower() in (ENDING, *FORMATS):
        raise typer.BadParameter(f"{out} is the name of a file; several files need a folder", param_hint="--out")
    jobs: list[Job] = []
    for file, root in found:
        if out == "-" or (file is None and out is None):
            jobs.append(Job(file, None))
        elif file is None or (out is not None and alone and not into):
            jobs.append(Job(file, Path(str(out))))
        else:
            jobs.append(Job(file, (Path(out) if out else root) / file.relative_to(root).with_suffix(ending)))
    _check_targets(jobs)
    return jobs


def _check_targets(jobs: Sequence[Job]) -> None:
    """Refuse outputs that are inputs too, or the same for two inputs."""
    sources = {job.source.resolve() for job in jobs if job.source is not None}
    targets: dict[Path, Job] = {}
    for job in jobs:
        if job.target is None:
            continue
        if job.target.resolve() in sources:
            raise typer.BadParameter(f"{job.target} is an input, and would be overwritten", param_hint="--out")
        if targets.setdefault(job.target, job) is not job:
            raise typer.BadParameter(f"{targets[job.target].label} and {job.label} would both become {job.target}")


class Work:
    """Go through jobs with progress on a terminal; failures are reported and counted, and end in exit code 1."""

    def __init__(self, verb: str) -> None:
        console = Console(stderr=True)
        quiet = not (console.is_terminal and sys.stdout.isatty())
        self._progress = Progress(console=console, transient=True, disable=quiet)
        self._verb = verb
        self._failures = 0

    def __enter__(self) -> Work:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.stop()
        if kind is None and self._failures:
            raise typer.Exit(1)

    def batches(self, jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
        """Cut the jobs into batches."""
        self._task = self._progress.add_task(self._verb, total=len(jobs))
        for begin in range(0, len(jobs), size):
            some = jobs[begin : begin + size]
            self._progress.update(self._task, description=f"{self._verb} {some[0].label}")
            yield some
            self._progress.update(self._task, completed=begin + len(some))

    def advance(self, jobs: float) -> None:
        """Count a part of the present jobs as done."""
        self._progress.advance(self._task, jobs)

    @contextlib.contextmanager
    def guard(self, *jobs: Job) -> Iterator[None]:
        """Report errors of the user's making, and go on."""
        try:
            yield
        except BrokenPipeError:
            raise
        except (SemantiCodecError, OSError) as error:
            self._failures += len(jobs)
            for job in jobs:
                complain(job.label, error)

    def attempt(self, job: Job, function: Callable[[], T]) -> list[T]:
        """Return what the function returns, or nothing if it fails."""
        results = []
        with self.guard(job):
            results.append(function())
        return results


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors of the user's making into a line and exit code 1, and warnings into lines."""
    show = warnings.showwarning

    def tell(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):
            complain("semanticodec", message)
        else:
            show(message, category, *place, **more)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = tell
            yield
    except BrokenPipeError:
        raise
    except (SemantiCodecError, OSError) as error:
        complain("semanticodec", error)
        raise typer.Exit(1) from error


def complain(label: str, error: object) -> None:
    """Say on the standard error, in one line, what is wrong with what."""
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename}: {error.strerror}" if error.filename not in (None, label) else error.strerror
    typer.echo(f"{label}: {' '.join(str(error).split())}", err=True)
