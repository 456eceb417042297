"""The command line; ``semanticodec --help`` lists the commands.

Exit codes: 0 all is well; 1 something could not be done, and a line on the standard error says what and why; 2 the
command line makes no sense.  Progress shows only on a terminal.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.metadata
import itertools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import wire
from ..config import DEFAULT_PRESET, PRESETS
from ..errors import AudioError, CheckpointError, ConfigError, CorruptedError
from . import novelty
from .bench import app as bench
from .edit import app as edit
from .generate import generate
from .jobs import ENDING, FORMATS, Job, Precision, Work, complain, find, plan, user_errors
from .models import models
from .tokenize import tokenize
from .upsample import upsample

if TYPE_CHECKING:
    from ..codec import Parts, SemantiCodec
    from .files import Stored

SHORT = 60
"""Seconds up to which files are read whole, to be encoded together."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(bench, name="bench")
app.add_typer(edit, name="edit")


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


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"semanticodec {importlib.metadata.version('semanticodec')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """Code speech, music and any other sound at 0.3 to 1.4 kbps."""


@app.command()
def encode(
    inputs: Inputs,
    out: Out = None,
    model: Model = DEFAULT_PRESET,
    preset: Preset = None,
    device: Device = "auto",
    dtype: Dtype = Precision.float32,
    batch: Annotated[
        int, typer.Option(min=1, help="Files of up to a minute to encode at once; longer ones go one by one.")
    ] = 1,
    per_channel: Annotated[
        bool, typer.Option("--per-channel/--downmix", help="Code each channel, or their average.")
    ] = False,
    entropy: Annotated[bool, typer.Option("--entropy", help="Code the codes too: smaller files, mini only.")] = False,
    force: Force = False,
) -> None:
    """Turn sound files into .scodec files."""
    from .. import audio
    from ..wire.prior import current
    from . import files

    with user_errors(), Work("encoding") as work:
        jobs = plan(inputs, out, tuple(FORMATS), ENDING)
        if entropy and model in PRESETS:  # before anything is fetched
            current(model)
        codec = _loader(device, dtype, "encoder")(model, preset)
        for some in work.batches(jobs, batch):
            pooled: list[files.Loaded] = []
            for job in some:
                with work.guard(job):
                    job.check_target(force)
                    with job.open_source() as source, audio.open_sound(job.source or source) as sound:
                        if batch > 1 and sound.frames <= SHORT * sound.samplerate:
                            pooled.append(files.Loaded.read(job, sound, per_channel=per_channel))
                        else:
                            files.encode_stream(
                                codec, job, sound, per_channel=per_channel, entropy=entropy, advance=work.advance
                            )
            with work.guard(*(one.job for one in pooled)):
                for job, header, codes in files.encode_pooled(codec, pooled, entropy=entropy):
                    with work.guard(job), job.open_target() as file:
                        wire.write_codes(file, header, codes)


@app.command()
def decode(
    inputs: Inputs,
    out: Out = None,
    model: Annotated[str | None, typer.Option(help="A preset or folder.  [default: what the file names]")] = None,
    device: Device = "auto",
    dtype: Dtype = Precision.float32,
    steps: Steps = None,
    fast: Annotated[bool, typer.Option("--fast", help="One step without guidance: less work, less detail.")] = False,
    seed: Seed = 0,
    batch: Annotated[
        int, typer.Option(min=1, help="Files of equal length to decode at once: a GPU is faster and needs more memory.")
    ] = 1,
    salvage: Annotated[bool, typer.Option("--salvage", help="Decode what damaged files have left.")] = False,
    force: Force = False,
) -> None:
    """Turn .scodec files into sound files of the original sample rate and length."""
    from .. import audio
    from ..diffusion import FAST, SamplerOptions
    from . import files

    def read(job: Job, stack: contextlib.ExitStack) -> tuple[Job, Stored, SemantiCodec]:
        job.check_target(force)
        stored = files.Stored.survey(stack.enter_context(job.open_source()), salvage=salvage)
        for gap in stored.gaps:
            complain(job.label, _describe(gap))
        if not stored.frames:
            raise AudioError("there are no codes to decode")
        header = stored.header
        audio.check_format(job.sound_format, header.sample_rate, header.channels)
        # A name in a stranger's file must not choose which folder is read.
        if model is None and header.preset not in PRESETS:
            raise CheckpointError(
                f"made by {header.preset!r}, which is no preset; name the folder of its weights with --model"
            )
        named = model is None or model == "mini" or model in PRESETS
        codec = load(model or header.preset, None if named else header.preset)
        check_weights(header, codec)
        return job, stored, codec

    with user_errors(), Work("decoding") as work:
        if fast and steps is not None:
            raise typer.BadParameter("--fast means one step; leave out --steps", param_hint="--fast")
        options = FAST if fast else SamplerOptions(steps=steps)
        jobs = plan(inputs, out, (ENDING,), ".wav")
        load = _loader(device, dtype, "decoder")
        if batch > 1:
            jobs.sort(key=lambda job: job.source.stat().st_size if job.source and job.source.exists() else 0)
        for some in work.batches(jobs, batch):
            with contextlib.ExitStack() as stack:
                ready = [one for job in some for one in work.attempt(job, functools.partial(read, job, stack))]
                for _, members in itertools.groupby(
                    ready, key=lambda one: (id(one[2]), one[1].header.channels, one[1].frames)
                ):
                    group = list(members)
                    with work.guard(*(job for job, *_ in group)):
                        alike = [(job, stored) for job, stored, _ in group]
                        for fraction in files.decode_alike(group[0][2], alike, seed, options):
                            work.advance(len(group) * fraction)


@app.command()
def info(inputs: Inputs) -> None:
    """Say what .scodec files hold, and check every byte of them."""
    from .files import Stored

    with user_errors(), Work("checking") as work:
        for some in work.batches([Job(file, None) for file, _ in find(inputs, (ENDING,))], 1):
            for job in some:
                with work.guard(job), job.open_source() as file:
                    stored = Stored.survey(file, salvage=True)
                    typer.echo("\n  ".join([job.label, *_facts(stored)]))
                    if stored.gaps:
                        raise CorruptedError("; ".join(map(_describe, stored.gaps)))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A preset's name, or a folder with weights in either layout.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    preset: Preset = None,
    dtype: Annotated[Precision | None, typer.Option(help="To store weights in.  [default: as they are]")] = None,
) -> None:
    """Turn published checkpoints into a folder of safetensors."""
    import torch

    from .. import checkpoints, inverse
    from ..model import CodecModel

    with user_errors():
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(errno.EEXIST, "there is something already", str(target))
        found = checkpoints.locate(source, preset)
        with torch.device("meta"):
            module = CodecModel(found.config, encoder=True, decoder=True)
        kept = None if dtype is None else getattr(torch, dtype.value)
        checkpoints.convert(found, target, module, kept)
        if inverse.present(found):
            tensors = {name: tensor.to(kept or tensor.dtype) for name, tensor in inverse.read(found).items()}
            inverse.save(target, found.config.decoder.latent.vae, tensors)
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
    from .. import demo as module
    from ..diffusion import SamplerOptions

    with user_errors():
        options = SamplerOptions(steps=steps)
        codec = _loader(device, dtype, "all")(model, preset)
        report = module.run(codec, recording or module.RECORDING, out, seed=seed, options=options)
        typer.echo(str(report))


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(context: typer.Context) -> None:
    """Serve the codec to clients over WebSockets; what follows goes to semanticodec_server."""
    try:
        from semanticodec_server.__main__ import app as server
    except ModuleNotFoundError as error:
        complain("serve", f"{error.name} is missing; install the extra: pip install 'semanticodec[server]'")
        raise typer.Exit(1) from None

    server(args=context.args, prog_name="semanticodec serve")


app.command()(tokenize)
app.command()(novelty.novelty)
app.command()(upsample)
app.command()(generate)
app.command()(models)


def main() -> None:
    """Run the command line."""
    # As an exception, so that what is half-written is cleared away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app()


def check_weights(header: wire.Header, codec: SemantiCodec) -> None:
    """Refuse codes of other codebooks.

    Raises:
        CheckpointError: the codes mean something else to this codec.
    """
    config = codec.config
    wanted = (header.token_rate, header.code_bits, header.weights)
    seen = (config.token_rate, config.code_bits, codec.weights_hash[:8])
    if wanted != seen:
        raise CheckpointError(
            f"the codes were made by {header.preset} with codebooks {header.weights}; loaded is {config.name} with "
            f"codebooks {codec.weights_hash[:8]}: name the right weights with --model"
        )


def _loader(device: str, dtype: Precision, parts: Parts) -> Callable[[str, str | None], SemantiCodec]:
    """Return a function that loads each model once."""
    import torch

    from ..codec import SemantiCodec
    from ..devices import usable_device

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        usable_device(device)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error
    precision: torch.dtype = getattr(torch, dtype.value)

    @functools.cache
    def load(model: str, preset: str | None) -> SemantiCodec:
        return SemantiCodec.from_pretrained(model, preset=preset, device=device, dtype=precision, parts=parts)

    return load


def _describe(gap: wire.Gap) -> str:
    if gap.stop == gap.start:
        return f"damage at frame {gap.start}, no frame lost: {gap.reason}"
    stop = "the end" if gap.stop is None else gap.stop
    return f"frames {gap.start} to {stop} lost: {gap.reason}"


def _facts(stored: Stored) -> list[str]:
    header, size = stored.header, stored.size
    seconds = stored.samples / header.sample_rate
    semantic, acoustic = header.code_bits
    net = header.channels * (semantic + acoustic) * stored.frames / (1000 * seconds) if seconds else 0.0
    return [
        f"model  {header.preset}, codebooks {header.weights}",
        f"sound  {seconds:.3f} s: {stored.samples} samples at {header.sample_rate} Hz, {header.channels} coded",
        f"codes  {stored.frames} frames of {semantic} + {acoustic} bits, {header.token_rate / 2:g} per second",
        f"net    {net:.3f} kbps" + (f", coded by the prior {header.prior:08x}" if header.prior is not None else ""),
        f"file   {size} bytes" + (f", {size * 8 / seconds / 1000:.3f} kbps" if seconds else ""),
    ]
