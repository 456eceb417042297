"""``semanticodec edit``: change recordings with a model that generates, without training."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .jobs import FORMATS, Precision, Unprompted, Work, plan, user_errors

if TYPE_CHECKING:
    from torch import Tensor

    from ..editing import Editor

Edit = tuple[str, dict[str, Any]]
"""The editor's method, and what it is told besides seed and sampler."""
Renew = Annotated[
    bool, typer.Option("--renew/--no-renew", help="Fresh noise on the kept part before each step, as published (DDIM).")
]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Change recordings with a model that generates.")


def transfer(
    strength: Annotated[float, typer.Option(help="From above 0 (little changes) to 1 (nothing is left).")] = 0.5,
) -> Edit:
    """Give recordings the style of a text or label."""
    return "transfer", {"strength": strength}


def inpaint(
    start: Annotated[
        list[float] | None, typer.Option(min=0, help="Seconds at which a generated part begins.  [default: 0]")
    ] = None,
    stop: Annotated[
        list[float] | None, typer.Option(help="Seconds at which it ends; inf is the end.  [default: inf]")
    ] = None,
    low: Annotated[list[float] | None, typer.Option(min=0, help="Hz from which on to generate.  [default: 0]")] = None,
    high: Annotated[list[float] | None, typer.Option(help="Hz up to which to generate.  [default: inf]")] = None,
    renew: Renew = True,
) -> Edit:
    """Generate a stretch of recordings, or a band of it, anew; the rest is kept to the sample.

    For several, give each option that you give as often as the others: the first of each belong together.
    """
    from ..editing import Region

    edges = {"start": start, "stop": stop, "low": low, "high": high}
    given = {name: values for name, values in edges.items() if values}
    if len({len(values) for values in given.values()}) > 1:
        counts = ", ".join(f"--{name} {len(values)} times" for name, values in given.items())
        raise typer.BadParameter(f"seen {counts}; for several regions give each of them as often as the others")
    rows = zip(*given.values(), strict=True) if given else [()]
    regions = [Region(**dict(zip(given, row, strict=True))) for row in rows]
    return "inpaint", {"regions": regions, "renew": renew}


def outpaint(
    before: Annotated[float, typer.Option(min=0, help="Seconds to generate before the recording.")] = 0.0,
    after: Annotated[float, typer.Option(min=0, help="Seconds to generate after it.")] = 0.0,
    renew: Renew = True,
) -> Edit:
    """Let recordings begin earlier and go on longer."""
    return "outpaint", {"before": before, "after": after, "renew": renew}


def upsample(
    cutoff: Annotated[float, typer.Option(min=1, help="Hz from which on to generate.")] = 4000.0,
    renew: Renew = True,
) -> Edit:
    """Generate the upper band by a mask over frequency; "semanticodec upsample" has models made for it."""
    return "upsample", {"cutoff": cutoff, "renew": renew}


def _run(
    edit: Edit,
    inputs: Annotated[list[str], typer.Argument(help="Files, folders, or - for the standard input.")],
    out: Annotated[str, typer.Option("--out", "-o", help="File, folder, or - for the standard output.")],
    prompt: Annotated[str, typer.Option(help="What shall be heard where sound is generated: a text, or a label.")] = "",
    negative: Annotated[str | None, typer.Option(help="What shall not be heard.")] = None,
    transcription: Annotated[str | None, typer.Option(help="What is said, for speech models.")] = None,
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
    published: Annotated[
        bool,
        typer.Option(
            "--published", help="Sample as published: DDIM, eta 1, the published timesteps, and a system's own steps."
        ),
    ] = False,
    policy: Annotated[Unprompted, typer.Option(help="What stands for no text, where the published codes differ.")] = (
        Unprompted.zeros
    ),
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")] = "auto",
    dtype: Annotated[Precision, typer.Option(help="Of the weights; half precision is for GPUs.")] = Precision.float32,
    offload: Annotated[bool, typer.Option(help="Have only the running part on the device, for small GPUs.")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite files.")] = False,
) -> None:
    import torch

    from .. import audio
    from ..diffusion import PUBLISHED, SamplerOptions
    from ..systems import SYSTEMS

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    method, told = edit
    asked = {"prompt": prompt, "negative": negative, "transcription": transcription}
    with user_errors(), Work("editing") as work:
        jobs = plan(inputs, out, tuple(FORMATS), ".wav")
        options = SamplerOptions()
        if published:
            options = SYSTEMS[model].published if model in SYSTEMS else replace(PUBLISHED, steps=None, guidance=None)
        options = replace(
            options,
            steps=options.steps if steps is None else steps,
            guidance=options.guidance if guidance is None else guidance,
        )
        editor_of = _editors(model, like, asked, policy, weights, offload, device=device, dtype=getattr(torch, dtype))
        for (job,) in work.batches(jobs, 1):
            with work.guard(job):
                job.check_target(force)
                with job.open_source() as source:
                    wave, rate = audio.load(source)
                editor = editor_of(wave, rate)
                heard = getattr(editor, method)(wave, rate, seed=seed, options=options, **told)
                with job.open_target() as target:
                    audio.save(target, heard, editor.sample_rate, job.sound_format)


def _editors(
    model: str,
    like: str | None,
    asked: dict[str, str | None],
    policy: Unprompted,
    weights: str | None,
    offload: bool,
    **place: Any,
) -> Callable[[Tensor, int], Editor]:
    """Load a model, and return the function that makes its editor for a recording."""
    from .. import audio
    from ..config import PRESETS
    from ..errors import ConfigError
    from ..generation import Generator

    if model not in PRESETS:
        if like is not None:
            raise ConfigError(f"--like is for codecs; {model} reads --prompt")
        generator = Generator.from_pretrained(model, weights=weights, offload=offload, **place)
        editor = generator.editor(
            asked["prompt"] or "",
            transcription=asked["transcription"] or "",
            negative=asked["negative"],
            policy=policy.value,
        )
        return lambda wave, rate: editor  # noqa: ARG005
    seen = {**asked, "policy": policy is not Unprompted.zeros, "weights": weights, "offload": offload}
    if any(seen.values()):
        needless = " and ".join(f"--{name}" for name, value in seen.items() if value)
        raise ConfigError(f"{model} is a codec: its codes say what is heard; leave out {needless}")
    from ..codec import SemantiCodec

    codec = SemantiCodec.from_pretrained(model, **place)
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
        with user_errors():
            edit = make(**{parameter.name: given.pop(parameter.name) for parameter in own})
        _run(edit, **given)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*shared[1:3], *own, *optional)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(make.__name__, help=make.__doc__)(command)


for _edit in (transfer, inpaint, outpaint, upsample):
    _command(_edit)
