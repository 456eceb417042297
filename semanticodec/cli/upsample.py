"""``semanticodec upsample``: fill the upper band of recordings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .jobs import FORMATS, Job, Precision, Work, plan, user_errors

if TYPE_CHECKING:
    from ..diffusion import SamplerOptions
    from ..superres import SuperResolution


def upsample(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders, or - for the standard input.")],
    out: Annotated[str, typer.Option("--out", "-o", help="File, folder, or - for the standard output.")],
    model: Annotated[
        str, typer.Option(help="mini-sr (24 kHz), audiosr-basic, audiosr-speech (48 kHz), or a folder with weights.")
    ] = "mini-sr",
    weights: Annotated[
        str | None, typer.Option(help="AudioSR's file, or its folder.  [default: where it is looked for]")
    ] = None,
    cutoff: Annotated[
        float | None, typer.Option(help="Hz from which on to generate.  [default: where the recording's band ends]")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.  [default: the preset's]")] = None,
    guidance: Annotated[float | None, typer.Option(help="How closely to follow.  [default: the preset's]")] = None,
    published: Annotated[
        bool, typer.Option("--published", help="AudioSR's own settings: DDIM, its steps and guidance.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")] = "auto",
    dtype: Annotated[Precision, typer.Option(help="Of the weights; half precision is for GPUs.")] = Precision.float32,
    offload: Annotated[bool, typer.Option(help="Have only the running part on the device, for small GPUs.")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite files.")] = False,
) -> None:
    """Raise recordings to the model's sample rate and generate the upper band that they lack."""
    import torch

    from ..diffusion import SamplerOptions
    from ..superres import SuperResolution
    from ..systems import SYSTEMS

    if published and (model not in SYSTEMS or steps is not None or guidance is not None):
        raise typer.BadParameter("is for systems, without --steps and --guidance", param_hint="--published")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with user_errors(), Work("upsampling") as work:
        jobs = plan(inputs, out, tuple(FORMATS), ".wav")
        restorer = SuperResolution.from_pretrained(
            model, weights=weights, device=device, dtype=getattr(torch, dtype), offload=offload
        )
        options = SYSTEMS[model].published if published else SamplerOptions(steps=steps, guidance=guidance)
        for (job,) in work.batches(jobs, 1):
            with work.guard(job):
                job.check_target(force)
                _one(restorer, job, cutoff, seed, options, work)


def _one(
    restorer: SuperResolution, job: Job, cutoff: float | None, seed: int, options: SamplerOptions, work: Work
) -> None:
    from .. import audio

    done = 0.0

    def advance(share: float) -> None:
        nonlocal done
        work.advance(share - done)
        done = share

    with job.open_source() as source:
        wave, rate = audio.load(source)
    heard = restorer.upsample(wave, rate, cutoff=cutoff, seed=seed, options=options, progress=advance)
    with job.open_target() as target:
        audio.save(target, heard, restorer.sample_rate, job.sound_format)
