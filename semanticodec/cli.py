"""The command line: ``semanticodec encode | decode | info | convert | demo``.

Exit codes: 0 all is well; 1 something could not be done, and a line on the standard error says what and why; 2 the
command line makes no sense.  Progress shows only on a terminal.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, TypeVar

import numpy as np
import soundfile
import soxr
import typer
from rich.console import Console
from rich.progress import Progress

from . import wire
from .config import DEFAULT_PRESET, PRESETS, SAMPLE_RATE
from .errors import AudioError, CheckpointError, CorruptedError, SemantiCodecError

if TYPE_CHECKING:
    from torch import Tensor

    from .codec import Parts, SemantiCodec
    from .diffusion import SamplerOptions

T = TypeVar("T")

ENDING = ".scodec"
FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}
"""Sound files that folders are searched for, and that can be written."""

app = typer.Typer(
    help="Code speech, music and any other sound at 0.3 to 1.4 kbps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Precision(StrEnum):
    """Floating-point types of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Inputs = Annotated[list[str], typer.Argument(help="Files, folders, or - for the standard input.")]
Out = Annotated[
    str | None,
    typer.Option("--out", "-o", help="File, folder, or - for the standard output.  [default: beside the input]"),
]
Model = Annotated[str, typer.Option(help="A preset's name, or a folder with weights.")]
Preset = Annotated[str | None, typer.Option(help="Which preset to take from a folder with several.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")]
Dtype = Annotated[Precision, typer.Option(help="Floating-point type to compute in.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Solver steps.  [default: the preset's]")]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the decoder's noise.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite files.")]


@app.command()
def encode(
    inputs: Inputs,
    out: Out = None,
    model: Model = DEFAULT_PRESET,
    preset: Preset = None,
    device: Device = "auto",
    dtype: Dtype = Precision.float32,
    batch: Annotated[int, typer.Option(min=1, help="Files to encode at once.")] = 1,
    per_channel: Annotated[
        bool, typer.Option("--per-channel/--downmix", help="Code each channel, or their average.")
    ] = False,
    force: Force = False,
) -> None:
    """Turn sound files into .scodec files."""
    from . import audio

    def load(job: Job) -> tuple[Job, Tensor, int, int]:
        _check_target(job, force)
        wave, rate = audio.load(io.BytesIO(_stdin().read()) if job.source is None else _existing(job.source))
        rows = audio.checked(wave if per_channel else wave.mean(0, keepdim=True))
        return job, audio.resample(rows, rate, SAMPLE_RATE), rate, rows.shape[1]

    with _user_errors(), _Work("encoding") as work:
        jobs = _plan(inputs, out, tuple(FORMATS), ENDING)
        codec = _loader(device, dtype, "encoder")(model, preset)
        for some in work.batches(jobs, batch):
            loaded = [ready for job in some for ready in work.attempt(job, functools.partial(load, job))]
            with work.guard(*(job for job, *_ in loaded)):
                coded = iter(codec.encode([row for _, rows, *_ in loaded for row in rows], SAMPLE_RATE))
                for job, rows, rate, samples in loaded:
                    codes = np.concatenate([one.cpu().numpy() for one in itertools.islice(coded, len(rows))])
                    header = wire.Header.of(codec.config, codec.weights_hash, rate, len(rows), samples)
                    with work.guard(job), _open_target(job) as file:
                        wire.write_codes(file, header, codes)


@app.command()
def decode(
    inputs: Inputs,
    out: Out = None,
    model: Annotated[str | None, typer.Option(help="A preset or folder.  [default: what the file names]")] = None,
    device: Device = "auto",
    dtype: Dtype = Precision.float32,
    steps: Steps = None,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(min=1, help="Files of equal length to decode at once.")] = 1,
    salvage: Annotated[bool, typer.Option("--salvage", help="Decode what damaged files have left.")] = False,
    force: Force = False,
) -> None:
    """Turn .scodec files into sound files of the original sample rate and length."""
    from .diffusion import SamplerOptions

    def read(job: Job) -> tuple[Job, wire.Recording, SemantiCodec]:
        _check_target(job, force)
        _sound_format(job)
        with _open_source(job) as file:
            recording = wire.read_codes(file, salvage=salvage)
        for gap in recording.gaps:
            _complain(job.label, _describe(gap))
        if not recording.codes.size:
            raise AudioError("there are no codes to decode")
        preset = recording.header.preset
        # A name in a stranger's file must not choose which folder is read.
        if model is None and preset not in PRESETS:
            raise CheckpointError(
                f"made by {preset!r}, which is no preset; name the folder of its weights with --model"
            )
        codec = load(model or preset, preset)
        check_weights(recording.header, codec)
        return job, recording, codec

    with _user_errors(), _Work("decoding") as work:
        options = SamplerOptions(steps=steps)
        jobs = _plan(inputs, out, (ENDING,), ".wav")
        load = _loader(device, dtype, "decoder")
        if batch > 1:
            jobs.sort(key=lambda job: job.source.stat().st_size if job.source and job.source.exists() else 0)
        for some in work.batches(jobs, batch):
            ready = [one for job in some for one in work.attempt(job, functools.partial(read, job))]
            for _, members in itertools.groupby(ready, key=lambda one: (id(one[2]), one[1].codes.shape)):
                group = list(members)
                with work.guard(*(job for job, *_ in group)), contextlib.ExitStack() as stack:
                    files = [(stack.enter_context(_open_target(job)), _sound_format(job)) for job, *_ in group]
                    recordings = [recording for _, recording, _ in group]
                    for fraction in _decode_alike(group[0][2], recordings, files, seed, options):
                        work.advance(len(group) * fraction)


@app.command()
def info(inputs: Inputs) -> None:
    """Say what .scodec files hold, and check every byte of them."""
    with _user_errors(), _Work("checking") as work:
        for some in work.batches(_plan(inputs, "-", (ENDING,), ENDING), 1):
            for job in some:
                with work.guard(job), _open_source(job) as file:
                    data = file.read()
                    recording = wire.read_codes(data, salvage=True)
                    typer.echo("\n  ".join([job.label, *_facts(recording, len(data))]))
                    if recording.gaps:
                        raise CorruptedError("; ".join(map(_describe, recording.gaps)))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A preset's name, or a folder with weights in either layout.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    preset: Preset = None,
    dtype: Annotated[Precision | None, typer.Option(help="To store weights in.  [default: as they are]")] = None,
) -> None:
    """Turn published checkpoints into a folder of safetensors."""
    import torch

    from . import checkpoints
    from .model import CodecModel

    with _user_errors():
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(errno.EEXIST, "there is something already", str(target))
        found = checkpoints.locate(source, preset)
        with torch.device("meta"):
            module = CodecModel(found.config, encoder=True, decoder=True)
        checkpoints.convert(found, target, module, None if dtype is None else getattr(torch, dtype.value))
        typer.echo(f"{target}: weights of {found.config.name}")


@app.command()
def demo(
    recording: Annotated[Path | None, typer.Argument(help="A sound file.  [default: the one shipped]")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("demo_out"),
    model: Model = DEFAULT_PRESET,
    preset: Preset = None,
    device: Device = "auto",
    dtype: Dtype = Precision.float32,
    steps: Steps = None,
    seed: Seed = 0,
) -> None:
    """Code a recording, decode it again, and write both, a picture and figures."""
    from . import demo as module
    from .diffusion import SamplerOptions

    with _user_errors():
        options = SamplerOptions(steps=steps)
        codec = _loader(device, dtype, "all")(model, preset)
        report = module.run(codec, _existing(recording or module.RECORDING), out, seed=seed, options=options)
        typer.echo(str(report))


def main() -> None:
    """Run the command line."""
    app()


# --- codecs and files -----------------------------------------------------------------------------------------------


def check_weights(header: wire.Header, codec: SemantiCodec) -> None:
    """Refuse codes that other weights have made.

    Raises:
        CheckpointError: the codec would decode them to something else.
    """
    config = codec.config
    wanted = (header.token_rate, header.code_bits, header.weights)
    seen = (config.token_rate, config.code_bits, codec.weights_hash[:8])
    if wanted != seen:
        raise CheckpointError(
            f"the codes were made by {header.preset} with weights {header.weights}; loaded is {config.name} with "
            f"weights {codec.weights_hash[:8]}: name the right ones with --model"
        )


def _decode_alike(
    codec: SemantiCodec,
    recordings: Sequence[wire.Recording],
    files: Sequence[tuple[BinaryIO, str]],
    seed: int,
    options: SamplerOptions,
) -> Iterator[float]:
    """Decode recordings with codes of one shape into (file, format) pairs; yield the fraction done by each step."""
    codes = np.concatenate([recording.codes for recording in recordings])
    channels, frames = recordings[0].codes.shape[0], codes.shape[2]
    step = 64 * codec.config.group
    pieces = (codes[..., at : at + step] for at in range(0, frames, step))
    with contextlib.ExitStack() as stack:
        sounds = [
            stack.enter_context(_Sound(file, recording, form))
            for (file, form), recording in zip(files, recordings, strict=True)
        ]
        for wave in codec.iter_decode(pieces, seed=seed, options=options):
            rows = wave.float().cpu().numpy()
            for index, sound in enumerate(sounds):
                sound.write(rows[index * channels : (index + 1) * channels].T)
            yield wave.shape[1] / codec.config.samples(frames)


def _loader(device: str, dtype: Precision, parts: Parts) -> Callable[[str, str | None], SemantiCodec]:
    """Return a function that loads each model once."""
    import torch

    from .codec import SemantiCodec

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"there is no device {device!r} here", param_hint="--device") from error
    precision: torch.dtype = getattr(torch, dtype.value)

    @functools.cache
    def load(model: str, preset: str | None) -> SemantiCodec:
        return SemantiCodec.from_pretrained(model, preset=preset, device=device, dtype=precision, parts=parts)

    return load


@dataclass(frozen=True)
class Job:
    """One input and its output; None is the standard input or output."""

    source: Path | None
    target: Path | None

    @property
    def label(self) -> str:
        """The name of the input in messages."""
        return "standard input" if self.source is None else str(self.source)


def _plan(inputs: Sequence[str], out: str | None, endings: tuple[str, ...], ending: str) -> list[Job]:
    """Pair every input file with its output; folders are searched, and their tree is mirrored."""
    folder = out is not None and out != "-" and (out.endswith(os.sep) or Path(out).is_dir())
    alone = len(inputs) == 1 and not Path(inputs[0]).is_dir()
    jobs: list[Job] = []
    for name in inputs:
        if name == "-":
            if not alone:
                raise typer.BadParameter("the standard input goes alone")
            if folder:
                raise typer.BadParameter("the standard input has no name to use in a folder", param_hint="--out")
            jobs.append(Job(None, None if out in (None, "-") else Path(str(out))))
            continue
        root, files = _search(Path(name), endings)
        for file in files:
            if out == "-":
                jobs.append(Job(file, None))
            elif out is not None and alone and not folder:
                jobs.append(Job(file, Path(out)))
            else:
                jobs.append(Job(file, (Path(out) if out else root) / file.relative_to(root).with_suffix(ending)))
    targets: dict[Path, Job] = {}
    for job in jobs:
        if job.target is not None and targets.setdefault(job.target, job) is not job:
            raise typer.BadParameter(f"{targets[job.target].label} and {job.label} would both become {job.target}")
    return jobs


def _search(source: Path, endings: tuple[str, ...]) -> tuple[Path, list[Path]]:
    """Return the folder that output paths are relative to, and the files."""
    if not source.is_dir():
        return source.parent, [source]
    files = sorted(file for file in source.rglob("*") if file.suffix.lower() in endings and file.is_file())
    if not files:
        raise FileNotFoundError(errno.ENOENT, f"no {', '.join(endings)} in this folder", str(source))
    return source, files


def _existing(path: Path) -> Path:
    path.open("rb").close()
    return path


def _sound_format(job: Job) -> str:
    ending = ".wav" if job.target is None else job.target.suffix.lower()
    if ending not in FORMATS:
        raise AudioError(f"cannot write {job.target}: its ending must be one of {', '.join(FORMATS)}")
    return FORMATS[ending]


def _check_target(job: Job, force: bool) -> None:
    if job.target is not None and job.target.exists() and not force:
        raise FileExistsError(errno.EEXIST, "exists; --force overwrites it", str(job.target))


def _stdin() -> BinaryIO:
    return typer.get_binary_stream("stdin")


@contextlib.contextmanager
def _open_source(job: Job) -> Iterator[BinaryIO]:
    if job.source is None:
        yield _stdin()
    else:
        with job.source.open("rb") as file:
            yield file


@contextlib.contextmanager
def _open_target(job: Job) -> Iterator[BinaryIO]:
    """Open what becomes the output once it is complete: nothing half-written is left by an error."""
    if job.target is None:
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            stdout = typer.get_binary_stream("stdout")
            shutil.copyfileobj(file, stdout)
            stdout.flush()
        return
    job.target.parent.mkdir(parents=True, exist_ok=True)
    part = job.target.with_name(job.target.name + ".part")
    try:
        with part.open("w+b") as file:
            yield file
        part.replace(job.target)
    finally:
        part.unlink(missing_ok=True)


class _Sound:
    """A sound file of a recording's sample rate and length, written from pieces at 16 kHz."""

    def __init__(self, file: BinaryIO, recording: wire.Recording, form: str) -> None:
        rate, self._channels = recording.header.sample_rate, recording.header.channels
        self._left = recording.samples
        self._resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(SAMPLE_RATE, rate, self._channels)
        try:
            self._file = soundfile.SoundFile(file, "w", rate, self._channels, format=form)
        except (soundfile.LibsndfileError, ValueError) as error:
            raise AudioError(f"cannot write {form} with {self._channels} channels at {rate} Hz: {error}") from error

    def __enter__(self) -> _Sound:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.write(np.zeros((0, self._channels), np.float32), last=True)
            # Rounding may have cost the resampler a sample or two.
            self._file.write(np.zeros((self._left, self._channels), np.float32))
        self._file.close()

    def write(self, wave: np.ndarray, *, last: bool = False) -> None:
        """Append float32 samples ``[samples, channels]``; what the recording did not have is cut off."""
        if self._resampler is not None:
            wave = self._resampler.resample_chunk(np.ascontiguousarray(wave), last=last)
        wave = wave[: self._left]
        self._file.write(wave.clip(-1, 1))
        self._left -= len(wave)


# --- what people see ------------------------------------------------------------------------------------------------


class _Work:
    """Go through jobs with progress on a terminal; failures are reported and counted, and end in exit code 1."""

    def __init__(self, verb: str) -> None:
        console = Console(stderr=True)
        quiet = not (console.is_terminal and sys.stdout.isatty())
        self._progress = Progress(console=console, transient=True, disable=quiet)
        self._verb = verb
        self._failures = 0

    def __enter__(self) -> _Work:
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
                _complain(job.label, error)

    def attempt(self, job: Job, function: Callable[[], T]) -> list[T]:
        """Return what the function returns, or nothing if it fails."""
        results = []
        with self.guard(job):
            results.append(function())
        return results


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except (SemantiCodecError, OSError) as error:
        _complain("semanticodec", error)
        raise typer.Exit(1) from error


def _complain(label: str, error: object) -> None:
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename}: {error.strerror}" if error.filename not in (None, label) else error.strerror
    typer.echo(f"{label}: {' '.join(str(error).split())}", err=True)


def _describe(gap: wire.Gap) -> str:
    if gap.stop == gap.start:
        return f"damage at frame {gap.start}, no frame lost: {gap.reason}"
    stop = "the end" if gap.stop is None else gap.stop
    return f"frames {gap.start} to {stop} lost: {gap.reason}"


def _facts(recording: wire.Recording, size: int) -> list[str]:
    header, frames = recording.header, recording.codes.shape[2]
    seconds = recording.samples / header.sample_rate
    semantic, acoustic = header.code_bits
    net = header.channels * (semantic + acoustic) * header.token_rate / 2000
    return [
        f"model  {header.preset}, weights {header.weights}",
        f"sound  {seconds:.3f} s: {recording.samples} samples at {header.sample_rate} Hz, {header.channels} coded",
        f"codes  {frames} frames of {semantic} + {acoustic} bits, {header.token_rate / 2:g} per second",
        f"net    {net:.3f} kbps",
        f"file   {size} bytes" + (f", {size * 8 / seconds / 1000:.3f} kbps" if seconds else ""),
    ]
