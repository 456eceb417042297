"""``semanticodec novelty``: how near generated sounds come to the recordings a model was trained on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import DEFAULT_PRESET
from ..errors import ConfigError
from .jobs import FORMATS, Job, Work, find, user_errors

if TYPE_CHECKING:
    from ..novelty import Embedder

Folder = Annotated[str, typer.Argument(help="A folder of sound files, or one of them.")]


def novelty(
    generated: Folder,
    training: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("novelty.html"),
    clap: Annotated[
        str | None,
        typer.Option(
            help="CLAP to compare by: a system that has one (musicldm), or a folder of transformers.  "
            "[default: features of mini's AudioMAE]"
        ),
    ] = None,
    pairs: Annotated[int, typer.Option(min=0, help="Nearest pairs that can be heard in the page.")] = 20,
    cache: Annotated[
        Path | None, typer.Option(help="Folder to keep embeddings in.  [default: <page's folder>/.novelty]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite the page.")] = False,
) -> None:
    """Find the training clip that each generated clip is most like, and write a page to hear the nearest pairs."""
    from ..novelty import compare, embed_file, summary
    from ..novelty_page import page

    with user_errors(), Work("embedding") as work:
        written = Job(None, out)
        written.check_target(force)
        embedder = _clap(clap, device) if clap else _mini(device)
        sides = []
        for name in (generated, training):
            jobs = [Job(file, None) for file, _ in find([name], (*FORMATS, ".opus"))]
            embed = functools.partial(embed_file, embedder=embedder, cache=cache or out.parent / ".novelty")
            sides.append(
                [
                    embedded
                    for some in work.batches(jobs, 1)
                    for job in some
                    if job.source is not None
                    for embedded in work.attempt(job, functools.partial(embed, job.source))
                ]
            )
        found = compare(sides[0], sides[1], embedder)
        with written.open_target() as file:
            file.write(page(found, pairs).encode())
        typer.echo(f"{summary(found)}\npage        {out}")


def _mini(device: str) -> Embedder:
    from ..codec import SemantiCodec
    from ..novelty import mae_embedder

    return mae_embedder(SemantiCodec.from_pretrained(DEFAULT_PRESET, device=device, parts="encoder"))


def _clap(name: str, device: str) -> Embedder:
    from ..conditioners.folders import load_clap
    from ..family import load_system
    from ..novelty import clap_embedder
    from ..systems import SYSTEMS

    if name in SYSTEMS:
        prompts = load_system(SYSTEMS[name], device=device).prompts
        if prompts is None:
            raise ConfigError(f"{name} has no CLAP; name one that reads prompts, see `semanticodec models`")
        return clap_embedder(prompts.clap, name)
    return clap_embedder(load_clap(name, device=device), name)
