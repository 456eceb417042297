"""``semanticodec edit``: change recordings with a text-to-sound system, without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from .jobs import FORMATS, Work, plan, user_errors

if TYPE_CHECKING:
    from torch import Tensor

    from ..diffusion import SamplerOptions
    from ..editing import Editor

app = typer.Typer(no_args_is_help=True, help="Change recordings with a text-to-sound system.")

Inputs = Annotated[list[str], typer.Argument(help="Files, folders, or - for the standard input.")]
Out = Annotated[str, typer.Option("--out", "-o", help="File, folder, or - for the standard output.")]
Prompt = Annotated[str, typer.Option(help="What shall be heard where sound is generated.")]
Model = Annotated[str, typer.Option(help="One of the systems that turn text to sound at 16 kHz.")]
Place = Annotated[str | None, typer.Option(help="The system's file, or its folder.  [default: where it is looked for]")]
Steps = Annotated[int | None, typer.Option(min=1, help="Solver steps.  [default: the preset's]")]
Guidance = Annotated[float | None, typer.Option(help="How closely to follow the prompt.  [default: the preset's]")]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the noise.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite files.")]
DEFAULT = "audioldm-s-full-v2"

Edit = Callable[["Editor", "Tensor", int, "SamplerOptions"], "Tensor"]


@app.command()
def transfer(
    inputs: Inputs,
    out: Out,
    prompt: Prompt,
    strength: Annotated[float, typer.Option(help="From above 0 (little changes) to 1 (nothing is left).")] = 0.5,
    model: Model = DEFAULT,
    weights: Place = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Give recordings the style of a text."""

    def edit(editor: Editor, wave: Tensor, rate: int, options: SamplerOptions) -> Tensor:
        return editor.transfer(wave, rate, strength=strength, seed=seed, options=options)

    _run(edit, inputs, out, prompt, model, weights, steps, guidance, device, force=force)


@app.command()
def inpaint(
    inputs: Inputs,
    out: Out,
    prompt: Prompt,
    start: Annotated[float, typer.Option(min=0, help="Seconds at which the generated part begins.")] = 0.0,
    stop: Annotated[float | None, typer.Option(help="Seconds at which it ends.  [default: the end]")] = None,
    low: Annotated[float, typer.Option(min=0, help="Hz from which on to generate.")] = 0.0,
    high: Annotated[float | None, typer.Option(help="Hz up to which to generate.  [default: all]")] = None,
    model: Model = DEFAULT,
    weights: Place = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Generate a stretch of recordings, or a band of it, anew; the rest is kept to the sample."""

    def edit(editor: Editor, wave: Tensor, rate: int, options: SamplerOptions) -> Tensor:
        from ..editing import Region

        return editor.inpaint(wave, rate, [Region(start, stop, low, high)], seed=seed, options=options)

    _run(edit, inputs, out, prompt, model, weights, steps, guidance, device, force=force)


@app.command()
def outpaint(
    inputs: Inputs,
    out: Out,
    prompt: Prompt,
    before: Annotated[float, typer.Option(min=0, help="Seconds to generate before the recording.")] = 0.0,
    after: Annotated[float, typer.Option(min=0, help="Seconds to generate after it.")] = 0.0,
    model: Model = DEFAULT,
    weights: Place = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Let recordings begin earlier and go on longer."""

    def edit(editor: Editor, wave: Tensor, rate: int, options: SamplerOptions) -> Tensor:
        return editor.outpaint(wave, rate, before=before, after=after, seed=seed, options=options)

    _run(edit, inputs, out, prompt, model, weights, steps, guidance, device, force=force)


@app.command()
def upsample(
    inputs: Inputs,
    out: Out,
    prompt: Prompt,
    cutoff: Annotated[float, typer.Option(min=1, help="Hz from which on to generate.")],
    model: Model = DEFAULT,
    weights: Place = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Generate the upper band by a mask over frequency; "semanticodec upsample" has models made for it."""

    def edit(editor: Editor, wave: Tensor, rate: int, options: SamplerOptions) -> Tensor:
        return editor.upsample(wave, rate, cutoff=cutoff, seed=seed, options=options)

    _run(edit, inputs, out, prompt, model, weights, steps, guidance, device, force=force)


def _run(
    edit: Edit,
    inputs: list[str],
    out: str,
    prompt: str,
    model: str,
    weights: str | None,
    steps: int | None,
    guidance: float | None,
    device: str,
    *,
    force: bool,
) -> None:
    import torch

    from .. import audio
    from ..conditioners.prompts import Prompts
    from ..devices import usable_device
    from ..diffusion import SamplerOptions
    from ..editing import prompted
    from ..family import load_system
    from ..systems import system

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with user_errors(), Work("editing") as work:
        jobs = plan(inputs, out, tuple(FORMATS), ".wav")
        options = SamplerOptions(steps=steps, guidance=guidance)
        row = system(model)
        editor = prompted(load_system(row, weights, device=usable_device(device)), Prompts([prompt]))
        for (job,) in work.batches(jobs, 1):
            with work.guard(job):
                job.check_target(force)
                with job.open_source() as source:
                    wave, rate = audio.load(source)
                heard = edit(editor, wave, rate, options)
                with job.open_target() as target:
                    audio.save(target, heard, editor.sample_rate, job.sound_format)
