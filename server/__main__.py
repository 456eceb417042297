"""``python -m semanticodec_server``, which is ``semanticodec serve``."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from typer.models import OptionInfo

from semanticodec.errors import SemantiCodecError

from .auth import Tokens
from .config import Config
from .engine import Work
from .gate import AddressLimits
from .limits import SECOND, Limits
from .shell import JsonFormatter, run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

DEFAULT, WORK, LIMITS, ADDRESSES = Config(), Work(), Limits(), AddressLimits()


def _option(what: str, name: str) -> OptionInfo:
    variable = f"SEMANTICODEC_{name.upper().replace('-', '_')}"
    option: OptionInfo = typer.Option(f"--{name}", help=what, envvar=variable)
    return option


@app.command()
def serve(
    host: Annotated[str, _option("Address to listen on.", "host")] = DEFAULT.host,
    port: Annotated[int, _option("Port to listen on; 0 takes a free one.", "port")] = DEFAULT.port,
    presets: Annotated[
        str, _option("Presets or folders of one family, with commas; the first is the default.", "presets")
    ] = ",".join(DEFAULT.presets),
    device: Annotated[str, _option("cpu, cuda, cuda:1 ...", "device")] = DEFAULT.device,
    batch: Annotated[int, _option("Streams per step.", "batch")] = WORK.batch,
    slots: Annotated[int, _option("Streams at a time.", "slots")] = WORK.slots,
    load: Annotated[float, _option("Share of the time that steps may take.", "load")] = WORK.load,
    threads: Annotated[int, _option("Threads of a CPU; 0 leaves PyTorch's choice.", "threads")] = WORK.threads,
    seed: Annotated[int, _option("Seed of the decoders' noise.", "seed")] = WORK.seed,
    tokens: Annotated[
        Path | None, _option("JSON or TOML file with tokens, hashed as sha256sum does.", "tokens")
    ] = None,
    origins: Annotated[
        str,
        _option(
            "Origins of web pages that may connect, with commas; our own needs it where its address has a name other "
            "than localhost or that of --host.",
            "origins",
        ),
    ] = "",
    proxies: Annotated[str, _option("Proxies whose X-Forwarded-For is believed, with commas.", "proxies")] = "",
    cert: Annotated[Path | None, _option("Certificate, for TLS.", "cert")] = None,
    key: Annotated[Path | None, _option("Its key.", "key")] = None,
    connections: Annotated[int, _option("Connections at a time.", "connections")] = DEFAULT.connections,
    per_address: Annotated[
        int, _option("Connections, and sessions, per address; what it may send grows with them.", "per-address")
    ] = (ADDRESSES.connections),
    keep: Annotated[float, _option("Seconds for which a session can be resumed.", "keep")] = LIMITS.keep / SECOND,
    idle: Annotated[float, _option("Seconds of silence after which a client is given up.", "idle")] = (
        LIMITS.idle / SECOND
    ),
    drain: Annotated[float, _option("Seconds for clients to leave at the end.", "drain")] = DEFAULT.drain,
    elsewhere: Annotated[str | None, _option("ws:// or wss:// address where they go on then.", "elsewhere")] = None,
    backplane: Annotated[str | None, _option("redis:// address of what several servers share.", "backplane")] = None,
    entropy: Annotated[
        bool, _option("Entropy-code codes for clients that ask for it; costs processor time.", "entropy")
    ] = LIMITS.entropy,
    log_level: Annotated[str, _option("debug, info, warning or error.", "log-level")] = "info",
) -> None:
    """Serve live encoding and decoding over WebSockets, and a web page to try it."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("semanticodec.websockets").setLevel("WARNING")
    try:
        if (cert is None) != (key is None):
            raise typer.BadParameter("a certificate and its key come together", param_hint="--cert, --key")
        config = Config(
            host=host,
            port=port,
            presets=_split(presets),
            device=device,
            work=Work(batch, slots, load, threads, seed),
            limits=replace(LIMITS, keep=int(keep * SECOND), idle=int(idle * SECOND), entropy=entropy),
            addresses=replace(
                ADDRESSES,
                connections=per_address,
                sessions=per_address,
                opens=max(ADDRESSES.opens, per_address // 4),
                requests=max(ADDRESSES.requests, per_address // 2),
                messages=64 * per_address,
                octets=per_address << 18,
            ),
            connections=connections,
            tokens=Tokens() if tokens is None else Tokens.read(tokens),
            origins=_split(origins),
            proxies=_split(proxies),
            certificate=None if cert is None or key is None else (cert, key),
            drain=drain,
            elsewhere=elsewhere,
            backplane=backplane,
        )
        fine = asyncio.run(run(config))
    except (SemantiCodecError, OSError) as error:
        typer.echo(f"semanticodec serve: {error}", err=True)
        raise typer.Exit(1) from error
    if not fine:
        raise typer.Exit(1)


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


if __name__ == "__main__":
    app()
