"""``semanticodec bench``: compare codecs at measured bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from ..errors import ConfigError
from .jobs import complain, user_errors

if TYPE_CHECKING:
    from ..bench.codecs import Codec
    from ..bench.pool import Advance

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Compare codecs at measured bits (needs the extra bench)."
)

Folder = Annotated[Path, typer.Argument(help="What `bench run` wrote.")]
Audio = Annotated[
    Path,
    typer.Argument(
        help="Folder of sound files (in speech/, music/ and sound/), or with manifest.csv (file, kind; text; group: "
        "what clips share, as a speaker, or orig: the path of the original; any labels)."
    ),
]
SETS = ("mini", "official", "classical", "neural")


def _codecs(
    sets: list[str],
    steps: list[int],
    fast: bool,
    weights: Path | None,
    hub: Path | None,
    config: Path | None,
    decodes: list[str],
) -> list[Codec]:
    """Gather the adapters that were asked for."""
    from ..bench.codecs import ours
    from ..bench.commands import classical, configured
    from ..bench.decodes import Decodes
    from ..bench.neural import hub as neural
    from ..config import PRESETS

    counts: tuple[int | None, ...] = tuple(steps) or (None,)
    unknown = set(sets) - set(SETS)
    if unknown:
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))}; sets are {', '.join(SETS)}; name single codecs with --only",
            param_hint="--codecs",
        )
    found: list[Codec] = []
    for wanted in sets:
        if wanted in ("mini", "official"):
            presets = tuple(name for name in PRESETS if name.startswith("mini") == (wanted == "mini"))
            found += ours(presets, counts, None if wanted == "mini" or weights is None else str(weights), fast=fast)
        elif wanted == "classical":
            found += classical()
        else:
            found += neural(hub)
    if config is not None:
        found += configured(config)
    names = [text.partition("=")[0] for text in decodes]
    for text in decodes:
        name, _, rest = text.partition("=")
        folder, _, kbps = rest.rpartition("@")
        try:
            stated = float(kbps)
        except ValueError:
            stated = math.nan
        if not 0 < stated < math.inf:
            raise typer.BadParameter(
                f"{text}: wanted is NAME=FOLDER@KBPS, with a bitrate above 0", param_hint="--decodes"
            )
        # Several bitrates of one system are points of one curve.
        called = f"{name} {stated:g}" if names.count(name) > 1 else name
        found.append(Decodes(called, Path(folder), stated, family=name))
    if not found:
        raise typer.BadParameter(
            f"no codec; sets are {', '.join(SETS)}; others come with --config and --decodes", param_hint="--codecs"
        )
    return found


def _only(codecs: list[Codec], names: str | None) -> list[Codec]:
    """Keep the codecs that are named; all without names."""
    if names is None:
        return codecs
    chosen = _names(names)
    absent = set(chosen) - {codec.name for codec in codecs}
    if absent:
        raise ConfigError(
            f"no codec {', '.join(sorted(absent))} among {', '.join(codec.name for codec in codecs)}; "
            "more come with --codecs, --config and --decodes"
        )
    return [codec for codec in codecs if codec.name in chosen]


@app.command()
def run(
    audio: Audio,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results, report and cache.")] = Path("bench_out"),
    codecs: Annotated[str, typer.Option(help=f"Sets with commas between: {', '.join(SETS)}.")] = "mini,classical",
    steps: Annotated[
        list[int] | None, typer.Option(min=1, help="Solver steps of our presets; may be given several times.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Add our presets as `decode --fast` decodes them.")] = False,
    weights: Annotated[Path | None, typer.Option(help="Folder with official weights.")] = None,
    hub: Annotated[Path | None, typer.Option(help="Folder with a folder per model of transformers.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file: [name] with encode = and decode = commands.")] = None,
    decodes: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER@KBPS: finished decodes; several of one NAME are called NAME KBPS."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="Codecs with commas between, of these; `bench codecs` lists them.  [default: all]"),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Metrics with commas between, as stoi,mel_l1; a wrong one names all.  [default: all]"),
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Take every n-th clip of each kind.")] = 1,
    costly_every: Annotated[int, typer.Option(min=1, help="Take slow metrics on every n-th of these.")] = 1,
    as_is: Annotated[bool, typer.Option("--as-is", help="Undo neither delay nor level.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes of one thread each.")] = 1,
    costs: Annotated[bool, typer.Option(help="Measure memory, operations and latency too.")] = True,
    title: Annotated[str, typer.Option(help="Of the report.")] = "Codecs at measured bits",
) -> None:
    """Measure codecs, and write a report.

    OUT gets report.html, results.json (and .jsonl, .parquet), plots/ for papers, gallery/, and cache/ of what is done,
    which is not done again.  The exit status is 1 if a codec failed on every clip, or none could run.
    """
    with user_errors():
        _need_extra()
        from ..bench import run as module
        from ..bench.clips import find, thin
        from ..bench.folders import emptied, marked
        from ..bench.metrics import METRICS
        from ..bench.report import hang, write_report
        from ..bench.survey import survey

        sets = _names(codecs) if codecs else []
        plan = module.Plan(
            _only(_codecs(sets, steps or [], fast, weights, hub, config, decodes or []), only),
            thin(find(audio), every),
            marked(out / "cache"),
            tuple(METRICS) if metrics is None else tuple(_names(metrics)) if metrics else (),
            costly_every,
            not as_is,
            jobs,
        )
        emptied(out / "gallery")  # now, and not after a night's work, if it is somebody else's
        with _progress() as progress:
            task = progress.add_task("starting")
            results = module.run(plan, title, _advance(progress, task))
            progress.update(task, description="looking at codes and costs")
            results = survey(results, plan, costs=costs)
        results.save(out)
        hang(results, plan.clips, plan.cache, out)
        for name, reason in {**results.skipped, **results.failed}.items():
            complain(name, reason)
        typer.echo(f"{write_report(results, out)}")
        if not results.systems:
            raise ConfigError("none of the codecs can run here; `semanticodec bench codecs` says what they need")
        useless = [name for name in results.systems if not results.values[name]]
        if useless:
            complain(", ".join(useless), "failed on every clip")
            raise typer.Exit(1)


@app.command()
def codecs(
    hub: Annotated[Path | None, typer.Option(help="Folder with a folder per model of transformers.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Folder with official weights.")] = None,
) -> None:
    """List what can be compared, and what is missing for the rest."""
    with user_errors():
        _need_extra()
        for codec in _codecs(list(SETS), [], False, weights, hub, None, []):
            typer.echo(f"{codec.name:<28}{codec.missing() or 'ready'}")


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder that `bench run` wrote, or a JSON file of results.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write to.  [default: that folder]")] = None,
) -> None:
    """Write report.html and the plots again."""
    with user_errors():
        _need_extra()
        from ..bench.report import write_report
        from ..bench.results import read_results

        if out is None and results.is_file():
            raise ConfigError(f"say with --out where the report on {results} shall be written")
        typer.echo(f"{write_report(read_results(results), out or results)}")


@app.command()
def leaderboard(
    results: Annotated[Path, typer.Argument(help="Folder that `bench run` wrote, or a JSON file of results.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to.  [default: leaderboard in that folder]")
    ] = None,
) -> None:
    """Write the results as Codec-SUPERB and VERSA read them.

    OUT/codec-superb/SYSTEM.row.json is a row for Codec-SUPERB's page (web/src/results/data.js).  SYSTEM.json beside it
    has the form of its result files, but not all of their metrics: its update_leaderboard.py would show what is absent,
    and bits that it does not know, as 0.  OUT/versa/SYSTEM.jsonl is for VERSA.
    """
    with user_errors():
        _need_extra()
        from ..bench.leaderboard import write_leaderboards
        from ..bench.results import read_results

        if out is None and results.is_file():
            raise ConfigError(f"say with --out where the rows of {results} shall be written")
        written, left_out = write_leaderboards(read_results(results), out or results / "leaderboard")
        for path, use in written.items():
            typer.echo(f"{path}: {use}")
        for name in left_out:
            complain(name, "left out: it has no bitrate, or no score that a leaderboard reads")


@app.command()
def listen(
    folder: Folder,
    audio: Audio,
    systems: Annotated[str, typer.Option(help="Up to 9 systems, with commas between.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for webMUSHRA's configs/.")] = Path("mushra"),
    key: Annotated[
        Path | None,
        typer.Option(
            help="File that says which stimulus is which, where no listener can read it.  [default: OUT-key.json]"
        ),
    ] = None,
    each: Annotated[int, typer.Option(min=1, help="Recordings of each kind.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the order of trials and the names of stimuli.")] = 0,
) -> None:
    """Export a listening test for webMUSHRA.

    OUT goes into webMUSHRA's configs/: stimuli of one loudness, with hidden reference and anchors of 3.5 and 7 kHz, and
    config.yaml.  What an earlier export put there is replaced.
    """
    with user_errors():
        _need_extra()
        from ..bench.clips import find
        from ..bench.listening import export
        from ..bench.results import read_results
        from ..bench.survey import listening_items

        results = read_results(folder)
        items = listening_items(results, find(audio), folder / "cache", _names(systems), each, seed)
        heard = [results.clips[item.name]["kind"] for item in items]
        for kind in results.kinds:
            if heard.count(kind) < each:
                few = f"{heard.count(kind)} trial{'s' * (heard.count(kind) != 1)} where {each} were asked for"
                complain(kind, f"{few}: of 3 to 12 s, and decoded by all of the systems, are no more")
        secret = export(items, out, key, seed=seed)
        name = out.resolve().name
        typer.echo(
            f"{out}: {len(items)} trials; put this folder into webMUSHRA's configs/, open ?config={name}/config.yaml"
        )
        typer.echo(
            f"{secret}: which stimulus is which; keep it to yourself, for: semanticodec bench analyse mushra.csv KEY"
        )


@app.command()
def analyse(
    answers: Annotated[Path, typer.Argument(help="webMUSHRA's mushra.csv.")],
    key: Annotated[Path, typer.Argument(help="The key that `bench listen` wrote.")],
    listener: Annotated[str, typer.Option(help="Column that tells listeners apart.")] = "listener",
    form: Annotated[Literal["text", "json"], typer.Option(help="Of the output.")] = "text",
) -> None:
    """Say what the listeners of a test said.

    Listeners are screened after ITU-R BS.1534-3; means come with 95 % intervals over listeners and paired tests.
    """
    with user_errors():
        _need_extra()
        import dataclasses
        import json

        from ..bench.listening import analyse as analysed

        verdict = analysed(answers, key, listener=listener)
        if not verdict.kept:
            why = "; ".join(f"{who} {reason}" for who, reason in verdict.excluded.items())
            raise ConfigError(f"no listener's answers count, as BS.1534-3 screens them: {why}")
        if form == "json":
            typer.echo(json.dumps(dataclasses.asdict(verdict), indent=1))
            return
        for who, why in verdict.excluded.items():
            typer.echo(f"left out {who}: {why}")
        alone = len(verdict.kept) == 1
        typer.echo(
            f"{len(verdict.kept)} listener{'' if alone else 's'}; 95 % intervals over {'trials' if alone else 'them'}"
        )
        for condition, mean in verdict.means.items():
            typer.echo(f"{condition:<24}{mean.mean:6.1f} [{mean.low:.1f}, {mean.high:.1f}], n = {mean.clips}")
        for pair in verdict.comparisons:
            typer.echo(f"{pair.first} - {pair.second}: {pair.difference:+.1f}, p (Holm) = {pair.verdict}")


@app.command()
def losses(
    audio: Audio,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for losses.json and losses.png.")] = Path(
        "bench_out"
    ),
    model: Annotated[str, typer.Option(help="A preset's name, or a folder with weights.")] = "mini-100",
    every: Annotated[int, typer.Option(min=1, help="Take every n-th clip of each kind.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.  [default: the preset's]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the losses and of the decoder's noise.")] = 0,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes of one thread each.")] = 1,
    cache: Annotated[Path | None, typer.Option(help="Folder of decodes and scores.  [default: cache in --out]")] = None,
    beside: Annotated[
        str,
        typer.Option(help="Codecs with commas between, of opus-* and codec2-*, that lose the same stretches of time."),
    ] = "",
) -> None:
    """Measure quality against lost blocks.

    Blocks are lost singly and in bursts; they are filled in by the model, muted, or filled with the last one's codes.
    Opus conceals its lost packets by itself, Codec 2 holds its last frame.  What is done is kept in the cache (of
    `bench run` too) and not done again.  losses.json has every kind of sound, and paired tests between the three ways.
    The exit status is 1 if a codec failed on every clip.
    """
    with user_errors():
        _need_extra()
        from ..bench import losses as module
        from ..bench.clips import find, thin
        from ..bench.codecs import Semanticodec
        from ..bench.curves import write
        from ..bench.figures import told
        from ..bench.folders import marked
        from ..bench.outages import interruptible
        from ..bench.results import ALL
        from ..checkpoints import locate
        from ..config import PRESETS

        name = locate(model).config.name
        codec = Semanticodec(name, steps, None if model in (*PRESETS, "mini") else model, seed)
        others = interruptible(_names(beside) if beside else [])
        clips = thin(find(audio), every)
        with _progress() as progress:
            task = progress.add_task(name, total=len(clips))
            kept = marked(cache or out / "cache")
            results = module.measure(codec, clips, kept, jobs, _advance(progress, task), others)
        write(out, results)
        for what, reason in {**results.skipped, **results.failed}.items():
            complain(what, reason)
        typer.echo(f"{'pattern':<8}{'rate':>6}  {'method':<11}{'lost':>7}  {'mel L1 [95 %]':<30}STOI [95 %]")
        for point in module.table(results):
            if point.kind == ALL:
                head = f"{point.pattern:<8}{point.rate:>6.0%}  {point.method:<11}{point.lost:>7.1%}"
                typer.echo(f"{head}  {told(point.mel_l1):<30}{told(point.stoi) if point.stoi else ''}")
        typer.echo(f"{out / 'losses.json'}: each kind of sound too, and paired tests")
        here = (out / "results.json").is_file()  # of `bench run`
        advice = f"; `semanticodec bench report {out}` puts them into the report" if here else ""
        if (out / "losses.png").is_file():
            typer.echo(f"{out / 'losses.png'}: curves{advice}")
        clean = [each for each in module.conditions(results.settings["beside"]) if not each.rate]
        useless = [each.method for each in clean if not results.scores(each.name, module.MEASURES[0])]
        if useless:
            complain(", ".join(useless), "failed on every clip")
            raise typer.Exit(1)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _advance(progress: Progress, task: TaskID) -> Advance:
    """Return what shows how far a stage is."""

    def show(stage: str, what: str, done: int, total: int) -> None:
        progress.update(task, description=f"{stage} {what}", completed=done, total=total)

    return show


def _need_extra() -> None:
    try:
        import matplotlib  # noqa: F401
        import pyarrow  # noqa: F401
        import pyloudnorm  # noqa: F401
        import scipy  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing; install the extra: pip install 'semanticodec[bench]'") from None
