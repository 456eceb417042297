"""``semanticodec edit``: change recordings with a model that generates, without training."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .jobs import FORMATS, Work, plan, user_errors

if TYPE_CHECKING:
    from torch import Tensor

    from ..diffusion import SamplerOptions
    from ..editing import Editor

Edit = Callable[["Editor", "Tensor", int, int, "SamplerOptions"], "Tensor"]
"""(editor, samples, their rate, seed, options) -> what is heard."""

app = typer.Typer(no_args_is_help=True, help="Change recordings with a model that generates.")


def transfer(
    strength: Annotated[float, typer.Option(help="From above 0 (little changes) to 1 (nothing is left).")] = 0.5,
) -> Edit:
    """Give recordings the style of a text or label."""
    return lambda editor, wave, rate, seed, options: editor.transfer(
        wave, rate, strength=strength, seed=seed, options=options
    )


def inpaint(
    start: Annotated[float, typer.Option(min=0, help="Seconds at which the generated part begins.")] = 0.0,
    stop: Annotated[float | None, typer.Option(help="Seconds at which it ends.  [default: the end]")] = None,
    low: Annotated[float, typer.Option(min=0, help="Hz from which on to generate.")] = 0.0,
    high: Annotated[float | None, typer.Option(help="Hz up to which to generate.  [default: all]")] = None,
) -> Edit:
    """Generate a stretch of recordings, or a band of it, anew; the rest is kept to the sample."""

    def edit(editor: Editor, wave: Tensor, rate: int, seed: int, options: SamplerOptions) -> Tensor:
        from ..editing import Region

        return editor.inpaint(wave, rate, [Region(start, stop, low, high)], seed=seed, options=options)

    return edit


def outpaint(
    before: Annotated[float, typer.Option(min=0, help="Seconds to generate before the recording.")] = 0.0,
    after: Annotated[float, typer.Option(min=0, help="Seconds to generate after it.")] = 0.0,
) -> Edit:
    """Let recordings begin earlier and go on longer."""
    return lambda editor, wave, rate, seed, options: editor.outpaint(
        wave, rate, before=before, after=after, seed=seed, options=options
    )


def upsample(
    cutoff: Annotated[float, typer.Option(min=1, help="Hz from which on to generate.")] = 4000.0,
) -> Edit:
    """Generate the upper band by a mask over frequency; "semanticodec upsample" has models made for it."""
    return lambda editor, wave, rate, seed, options: editor.upsample(
        wave, rate, cutoff=cutoff, seed=seed, options=options
    )


def _run(
    edit: Edit,
    inputs: Annotated[list[str], typer.Argument(help="Files, folders, or - for the standard input.")],
    out: Annotated[str, typer.Option("--out", "-o", help="File, folder, or - for the standard output.")],
    prompt: Annotated[str, typer.Option(help="What shall be heard where sound is generated: a text, or a label.")] = "",
    model: Annotated[
        str, typer.Option(help="mini-gen, a 16 kHz system that reads prompts, or a codec preset such as mini-100.")
    ] = "mini-gen",
    like: Annotated[
        str | None, typer.Option(help="For codecs: the recording whose codes say what is heard.  [default: the input]")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="The system's file, or its folder.  [default: where it is looked for]")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.  [default: the preset's]")] = None,
    guidance: Annotated[float | None, typer.Option(help="How closely to follow.  [default: the preset's]")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")] = "auto",
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite files.")] = False,
) -> None:
    import torch

    from .. import audio
    from ..diffusion import SamplerOptions

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with user_errors(), Work("editing") as work:
        jobs = plan(inputs, out, tuple(FORMATS), ".wav")
        options = SamplerOptions(steps=steps, guidance=guidance)
        editor_of = _editors(model, prompt, like, weights, device)
        for (job,) in work.batches(jobs, 1):
            with work.guard(job):
                job.check_target(force)
                with job.open_source() as source:
                    wave, rate = audio.load(source)
                editor = editor_of(wave, rate)
                heard = edit(editor, wave, rate, seed, options)
                with job.open_target() as target:
                    audio.save(target, heard, editor.sample_rate, job.sound_format)


def _editors(
    model: str, prompt: str, like: str | None, weights: str | None, device: str
) -> Callable[[Tensor, int], Editor]:
    """Load a model, and return the function that makes its editor for a recording."""
    from .. import audio
    from ..config import PRESETS
    from ..errors import ConfigError
    from ..generation import Generator

    if model not in PRESETS:
        if like is not None:
            raise ConfigError(f"--like is for codecs; {model} reads --prompt")
        editor = Generator.from_pretrained(model, weights=weights, device=device).editor(prompt)
        return lambda wave, rate: editor  # noqa: ARG005
    if prompt or weights is not None:
        raise ConfigError(f"{model} is a codec: its codes say what is heard; leave out --prompt and --weights")
    from ..codec import SemantiCodec

    codec = SemantiCodec.from_pretrained(model, device=device)
    if like is None:
        return lambda wave, rate: codec.editor(codec.encode(wave.mean(0), rate))
    wave, rate = audio.load(like)
    editor = codec.editor(codec.encode(wave.mean(0), rate))
    return lambda wave, rate: editor  # noqa: ARG005


def _command(make: Callable[..., Edit]) -> None:
    """Add a command: the options of an edit, and those that all edits share."""
    own, shared = (list(inspect.signature(function, eval_str=True).parameters.values()) for function in (make, _run))
    optional = [parameter for parameter in shared[3:] if parameter.name != "edit"]

    def command(**given: Any) -> None:
        edit = make(**{parameter.name: given.pop(parameter.name) for parameter in own})
        _run(edit, **given)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*shared[1:3], *own, *optional)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(make.__name__, help=make.__doc__)(command)


for _edit in (transfer, inpaint, outpaint, upsample):
    _command(_edit)
