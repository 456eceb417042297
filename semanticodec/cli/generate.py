"""``semanticodec generate``: sound from texts, labels or other sound."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from .jobs import FORMATS, Job, Precision, Unprompted, user_errors

if TYPE_CHECKING:
    from torch import Tensor

    from ..generation import Generator

LONGEST_NAME = 60


def generate(
    texts: Annotated[
        list[str] | None, typer.Argument(help="What shall be heard: descriptions, or labels for mini-gen.")
    ] = None,
    out: Annotated[
        str,
        typer.Option("--out", "-o", help="A folder; or a sound file, for one result; or - for the standard output."),
    ] = ".",
    model: Annotated[
        str, typer.Option(help="mini-gen, a system that reads prompts (see `semanticodec models`), or a folder.")
    ] = "mini-gen",
    weights: Annotated[
        str | None, typer.Option(help="The system's file, or its folder.  [default: where it is looked for]")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Seconds of each result.  [default: 10, or those of the recording given]")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Results per text, best first if the model's CLAP hears.")] = 1,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Generate so many, and keep the n that CLAP likes best.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What shall not be heard.")] = None,
    transcription: Annotated[str | None, typer.Option(help="What is said, for speech models.")] = None,
    like: Annotated[
        str | None, typer.Option(help="A sound file to generate similar sounds to, instead of texts.")
    ] = None,
    loud_as: Annotated[
        str | None, typer.Option(help="A sound file whose loudness is followed moment by moment (mini-gen).")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.  [default: the preset's]")] = None,
    guidance: Annotated[float | None, typer.Option(help="How closely to follow.  [default: the preset's]")] = None,
    published: Annotated[
        bool, typer.Option("--published", help="A system's own settings: DDIM, its steps, guidance and candidates.")
    ] = False,
    policy: Annotated[Unprompted, typer.Option(help="What stands for no text, where the published codes differ.")] = (
        Unprompted.zeros
    ),
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Of the first candidate; the others count on.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")] = "auto",
    dtype: Annotated[Precision, typer.Option(help="Of the weights; half precision is for GPUs.")] = Precision.float32,
    offload: Annotated[bool, typer.Option(help="Have only the running part on the device, for small GPUs.")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite files.")] = False,
) -> None:
    """Generate sound from texts or labels, or sounds similar to one."""
    import torch

    from .. import audio, controls
    from ..diffusion import SamplerOptions
    from ..generation import Generator
    from ..systems import SYSTEMS

    if bool(texts) == (like is not None):
        raise typer.BadParameter("give texts, or --like and a sound file")
    for name, value in (("--loud-as", loud_as), ("--transcription", transcription)):
        if like is not None and value is not None:
            raise typer.BadParameter("is for texts; leave it out beside --like", param_hint=name)
    last = seed + max(n, candidates or 0) - 1
    if last >= 2**64:
        raise typer.BadParameter(f"the last candidate's would be {last}, over 2**64 - 1", param_hint="--seed")
    if published and (model not in SYSTEMS or steps is not None or guidance is not None):
        raise typer.BadParameter("is for systems, without --steps and --guidance", param_hint="--published")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    names = texts or [Path(str(like)).stem]
    jobs = _targets(names, n, out)
    console = Console(stderr=True)
    with user_errors(), Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        for job in jobs:
            job.check_target(force)
            job.sound_format  # noqa: B018 - complain before the work
        task = bar.add_task("loading", total=1.0)
        generator = Generator.from_pretrained(
            model, weights=weights, device=device, dtype=getattr(torch, dtype), offload=offload
        )
        bar.update(task, description="generating")
        options = SYSTEMS[model].published if published else SamplerOptions(steps=steps, guidance=guidance)
        usual = max(n, SYSTEMS[model].candidates) if published else n
        ranked = candidates or (usual if usual > 1 and generator.ranks else None)
        if like is not None:
            wave, rate = audio.load(like)
            waves = generator.similar(
                wave,
                rate,
                duration=duration,
                n=n,
                candidates=ranked,
                seed=seed,
                negative=negative,
                options=options,
                progress=lambda share: bar.update(task, completed=share),
            )
        else:
            curve = None
            if loud_as is not None:
                wave, rate = audio.load(loud_as)
                curve = controls.loudness_of(wave, rate, generator.latent.config)
                duration = wave.shape[-1] / rate if duration is None else duration
            waves = generator.generate(
                names,
                duration=10.0 if duration is None else duration,
                n=n,
                candidates=ranked,
                seed=seed,
                negatives=negative,
                transcriptions=() if transcription is None else [transcription] * len(names),
                loudness=curve,
                policy=policy.value,
                options=options,
                progress=lambda share: bar.update(task, completed=share),
            ).flatten(0, 1)
        _write(jobs, waves, generator)


def _write(jobs: list[Job], waves: Tensor, generator: Generator) -> None:
    from .. import audio

    for job, wave in zip(jobs, waves, strict=True):
        with job.open_target() as target:
            audio.save(target, wave[None], generator.sample_rate, job.sound_format)
        if job.target is not None:
            typer.echo(job.target)


def _targets(names: list[str], n: int, out: str) -> list[Job]:
    """Return where each result goes: text by text, the n of each one after the other."""
    count = len(names) * n
    into = Path(out).is_dir() or out.endswith(os.sep)
    if out == "-" or (not into and Path(out).suffix.lower() in FORMATS):
        if count > 1:
            raise typer.BadParameter(f"{count} results need a folder", param_hint="--out")
        return [Job(None, None if out == "-" else Path(out))]
    taken: set[str] = set()
    jobs = []
    for name in names:
        base = stem = re.sub(r"\W+", "-", name.lower()).strip("-")[:LONGEST_NAME] or "sound"
        for number in itertools.count(2):
            if stem not in taken:
                break
            stem = f"{base}-{number}"
        taken.add(stem)
        jobs += [Job(None, Path(out) / f"{stem}{f'.{k + 1}' if n > 1 else ''}.wav") for k in range(n)]
    return jobs
