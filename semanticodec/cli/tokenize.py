"""``semanticodec tokenize``: corpora of sound into shards of codes."""

from __future__ import annotations

import time
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..config import DEFAULT_PRESET
from ..errors import ConfigError
from .jobs import Precision, complain, user_errors

if TYPE_CHECKING:
    from ..corpus import Progress as Status


SILENCE = 60.0
"""Seconds between lines of progress where there is no terminal: what runs for days under nohup is to be followed."""


class Engine(StrEnum):
    """What the work is spread over."""

    local = "local"
    ray = "ray"


class Form(StrEnum):
    """Formats of shards."""

    parquet = "parquet"
    webdataset = "webdataset"
    shar = "shar"


def tokenize(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Files, folders, globs; JSONL, WebDataset, Parquet, Arrow, Lhotse cuts; URLs.  Or: verify DIR.",
        ),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the shards.")] = None,
    model: Annotated[
        str | None, typer.Option(help=f"A preset's name, or a folder with weights.  [default: {DEFAULT_PRESET}]")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Which preset to take from a folder with several.")] = None,
    engine: Annotated[Engine, typer.Option(help="Processes of this machine, or a Ray cluster.")] = Engine.local,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster: auto, ray://host:10001 ...  [default: start one here]")
    ] = None,
    devices: Annotated[str, typer.Option(help="cpu, cuda, or cuda:0,cuda:1 ...: one encoder each.")] = "cpu",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Encoders on a CPU, else decoding threads or tasks.  [default: the cores]")
    ] = None,
    encoders: Annotated[
        int | None, typer.Option(min=1, help="Ray: encoding actors at most.  [default: the cores, or the GPUs]")
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="Floating-point type to compute in.")] = Precision.float32,
    batch_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Sound in one call of the encoder.  [default: the device's]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is there.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the corpus that is there.")] = False,
    retry_failures: Annotated[
        bool, typer.Option("--retry-failures", help="Try again what failed, in a corpus that is finished.")
    ] = False,
    keep_features: Annotated[bool, typer.Option("--keep-features", help="Keep the continuous features too.")] = False,
    split_stereo: Annotated[
        bool, typer.Option("--split-stereo/--downmix", help="A row per channel, or of their average.")
    ] = False,
    vad: Annotated[bool, typer.Option("--vad", help="A row per stretch of speech (WebRTC's detector).")] = False,
    form: Annotated[Form, typer.Option("--format", help="Of the shards.")] = Form.parquet,
    shard_mb: Annotated[float, typer.Option(min=0.001, help="Megabytes per shard, about.")] = 200,
    sample: Annotated[int, typer.Option(min=0, help="verify: rows to encode again.")] = 16,
) -> None:
    """Turn a corpus of sound into shards of codes, or check one: tokenize verify DIR."""
    with user_errors():
        try:
            from .. import corpus
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is missing; pip install 'semanticodec[corpus]'") from error
        if inputs[0] == "verify" and output is None:
            _verify(inputs[1:], model, preset, devices, dtype, sample)
            return
        if output is None:
            raise typer.BadParameter("name a folder for the shards", param_hint="--output")
        if overwrite and (resume or retry_failures):
            raise typer.BadParameter("--overwrite excludes --resume and --retry-failures")
        options = corpus.CorpusOptions(
            model=model or DEFAULT_PRESET,
            preset=preset,
            engine=engine.value,
            address=address,
            devices=tuple(device.strip() for device in devices.split(",")),
            workers=workers,
            encoders=encoders,
            dtype=dtype.value,
            batch_seconds=batch_seconds,
            channels="split" if split_stereo else "downmix",
            vad=vad,
            keep_features=keep_features,
            form=form.value,
            shard_mb=shard_mb,
        )
        with _Bar() as bar:
            try:
                statistics = corpus.tokenize_corpus(
                    inputs,
                    output,
                    options=options,
                    resume=resume,
                    overwrite=overwrite,
                    retry_failures=retry_failures,
                    progress=bar.show,
                )
            except KeyboardInterrupt:
                complain("tokenize", f"stopped; what is done is kept: --resume goes on ({output})")
                raise typer.Exit(130) from None
        typer.echo(_summary(output, statistics))
        if options.kind != "cpu" or dtype is not Precision.float32:
            typer.echo(str(corpus.verify_corpus(output, sample=sample, model=model, preset=preset)))
        if statistics["failures"]:
            told = f"{statistics['failures']} inputs failed; {output / 'failures.parquet'} says why"
            complain("tokenize", f"{told}, --retry-failures tries them again")
            raise typer.Exit(1)


def _verify(
    folders: list[str], model: str | None, preset: str | None, devices: str, dtype: Precision, sample: int
) -> None:
    from .. import corpus

    if len(folders) != 1:
        raise typer.BadParameter("verify takes one folder")
    report = corpus.verify_corpus(
        Path(folders[0]), sample=sample, model=model, preset=preset, device=devices, dtype=dtype.value
    )
    typer.echo(str(report))
    if report.faults:
        raise typer.Exit(1)


def _summary(output: Path, statistics: dict[str, Any]) -> str:
    lines = [
        f"{output}: {statistics['rows']} rows, {statistics['hours']:.3f} hours in {statistics['shards']} shards; "
        f"{statistics['failures']} inputs failed"
    ]
    for name, book in statistics.get("codebooks", {}).items():
        lines.append(f"  {name}: {book['used']} of {book['entries']} codes used, perplexity {book['perplexity']:.0f}")
    return "\n".join(lines)


class _Bar:
    """Progress: inputs, hours, hours per hour, time left, failures; without a terminal a line a minute."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("tokenising"), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._begin: float | None = None
        self._told = time.monotonic()

    def __enter__(self) -> _Bar:
        self._progress.start()
        self._task = self._progress.add_task("tokenising", total=None, told="listing the inputs")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, status: Status) -> None:
        """Show how far the run is."""
        self._begin = self._begin or time.monotonic()
        told = f"{status.items}/{status.total} inputs, {status.seconds / 3600:.2f} h"
        done, spent = status.share - status.begun, time.monotonic() - self._begin
        if done > 0 and spent > 0:
            left = timedelta(seconds=round(spent / done * (1 - status.share)))
            told += f", {status.new_seconds / spent:.0f} h per hour, {left} left"
        told += f", {status.failures} failed" if status.failures else ""
        self._progress.update(self._task, total=1.0, completed=status.share, told=told)
        if self._progress.disable and time.monotonic() - self._told >= SILENCE:
            self._told = time.monotonic()
            typer.echo(f"tokenising {status.share:.1%}: {told}", err=True)
