"""A server in a process of its own: killed and started again, and behind a link of 8 kbit/s and 200 ms."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from test_backplane import free_port
from test_faults import Proxy, Weather

from benchmarks.serving import voice
from semanticodec import SemantiCodec
from semanticodec_client import CodesBlock, Gap, Restarted, Retry, connect

ROOT = Path(__file__).parent.parent
BLOCK = 5120
PATIENT = Retry(base=0.05, cap=1.0, deadline=120, random=random.Random(0))

pytestmark = pytest.mark.slow


@contextlib.asynccontextmanager
async def started(port: int, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run ``semanticodec serve`` and wait until it is ready."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server", "--port", str(port), "--threads", "1", *options),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    while b'"ready"' not in (line := await process.stderr.readline()):
        assert line, "the server ended before it was ready"
    drain = asyncio.create_task(process.stderr.read())
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await drain


def test_a_server_killed_and_started_again_is_found_and_the_gap_is_told() -> None:
    """Every block that came is the one that was sent, once; where some are gone, a restart is told."""
    port = free_port()
    model = SemantiCodec.from_pretrained("mini-50")
    codes = model.encode(np.resize(voice(), 40 * BLOCK), 16_000)[0].numpy()
    blocks = np.split(codes, 40, axis=1)
    options: dict[str, Any] = {"room": "den", "retry": PATIENT, "preset": "mini-50"}
    heard: list[Any] = []

    async def listen(ear: Any) -> None:
        async for item in ear:
            heard.append(item)

    async def test() -> None:
        url = f"ws://127.0.0.1:{port}/"
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(started(port))
            ear = await stack.enter_async_context(connect(url, role="subscribe", receive=["codes"], **options))
            listening = asyncio.create_task(listen(ear))
            mouth = await stack.enter_async_context(connect(url, role="publish", send="codes", **options))
            for block in blocks[:20]:
                await mouth.push(block)
                await asyncio.sleep(0.02)
            first.send_signal(signal.SIGKILL)
            await first.wait()
            await mouth.push(blocks[20])
            await stack.enter_async_context(started(port))
            while mouth.restarts == 0 or ear.restarts == 0:
                await asyncio.sleep(0.05)
            for block in blocks[21:]:
                await mouth.push(block)
            await mouth.flush()
            while not any(isinstance(i, CodesBlock) and np.array_equal(i.codes, blocks[-1]) for i in heard):
                await asyncio.sleep(0.05)
            listening.cancel()

    asyncio.run(asyncio.wait_for(test(), 180))
    restarts = [i for i, item in enumerate(heard) if isinstance(item, Restarted)]
    assert len(restarts) == 1
    before, after = ([i.codes for i in part if _is_block(i)] for part in (heard[: restarts[0]], heard[restarts[0] :]))
    assert len(before) > 0
    np.testing.assert_array_equal(before, blocks[: len(before)])
    assert len(after) >= 19
    np.testing.assert_array_equal(after, blocks[40 - len(after) :])


def _is_block(item: object) -> bool:
    return isinstance(item, CodesBlock)


def network(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace at 10.77.31.2 whose link to 10.77.31.1 carries 8 kbit/s."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("needs root, ip and tc")
    name = "semanticodec-test"
    inside = ("ip", "netns", "exec", name)
    try:
        network("ip", "netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
    try:
        network("ip", "link", "add", "sc-out", "type", "veth", "peer", "name", "sc-in", "netns", name)
        network("ip", "addr", "add", "10.77.31.1/24", "dev", "sc-out")
        network("ip", "link", "set", "sc-out", "up")
        network(*inside, "ip", "addr", "add", "10.77.31.2/24", "dev", "sc-in")
        network(*inside, "ip", "link", "set", "sc-in", "up")
        limit = ("root", "tbf", "rate", "8kbit", "burst", "1600", "latency", "4s")
        network("tc", "qdisc", "add", "dev", "sc-out", *limit)
        network(*inside, "tc", "qdisc", "add", "dev", "sc-in", *limit)
        yield name
    finally:
        network("ip", "netns", "del", name)


def test_codes_through_8_kilobits_and_200_milliseconds(namespace: str, tmp_path: Path) -> None:
    """The bandwidth is the kernel's; the delay of 200 +- 50 ms is a proxy's, because not every kernel has netem."""
    path = tmp_path / "voice.wav"
    sound = np.resize(voice(), 30 * BLOCK)
    soundfile.write(path, sound, 16_000, subtype="FLOAT")
    wanted = SemantiCodec.from_pretrained("mini-50").encode(sound, 16_000)[0].numpy()
    port = free_port()

    async def test() -> tuple[list[Any], str]:
        proxy = Proxy(port, Weather(least=0.15, delay=0.25), 0)
        async with (
            started(port),
            await asyncio.start_server(proxy.serve, "10.77.31.1", 0) as listening,
            connect(
                f"ws://127.0.0.1:{port}/", role="subscribe", room="main", receive=["codes"], preset="mini-50"
            ) as ear,
        ):
            far = listening.sockets[0].getsockname()[1]
            sender = await asyncio.create_subprocess_exec(
                *("ip", "netns", "exec", namespace, sys.executable, "-m", "client", "send", str(path), "--local"),
                *("--preset", "mini-50", "--url", f"ws://10.77.31.1:{far}/"),
                cwd=ROOT,
                stderr=asyncio.subprocess.PIPE,
            )
            heard = []
            async for item in ear:
                heard.append(item)
                if sum(map(_is_block, heard)) == 30:
                    break
            _, said = await sender.communicate()
            assert sender.returncode == 0, said.decode()
            return heard, said.decode()

    heard, said = asyncio.run(asyncio.wait_for(test(), 240))
    codes = np.concatenate([item.codes for item in heard if isinstance(item, CodesBlock)], 1)
    np.testing.assert_array_equal(codes, wanted)
    assert not any(isinstance(item, Gap | Restarted) for item in heard)
    assert " 0 lost" in said
