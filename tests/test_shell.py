"""What the server's sockets do about peers that mean harm, with small random models."""

from __future__ import annotations

import asyncio
import base64
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
from test_server import CONFIG, listen, models, peer, publish, run, serving
from websockets.datastructures import Headers

from semanticodec.wire.closing import Code
from semanticodec.wire.messages import SUBPROTOCOL, Audio, Hello, encode
from server import shell
from server.config import Config
from server.gate import AddressLimits, Gate
from server.shell import BACKLOG, Server

OPENING = (
    "GET / HTTP/1.1\r\n{}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\nSec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}\r\n\r\n"
)
GENEROUS = AddressLimits(messages=1 << 30, octets=1 << 40)


def frame(opcode: int, data: bytes) -> bytes:
    assert len(data) < 126
    return bytes([0x80 | opcode, 0x80 | len(data)]) + bytes(4) + data


async def opened(
    server: Server, *headers: str, request: Hello | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 12)
    writer.write(OPENING.format("\r\n".join(headers or ["Host: 127.0.0.1"])).encode())
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    if request is not None:
        writer.write(frame(2, encode(request)))
        await reader.read(1)
    return reader, writer


async def ended(reader: asyncio.StreamReader) -> bytes:
    """Read until the server hangs up; return what it said."""
    data = b""
    try:
        while more := await reader.read(1 << 16):
            data += more
    except ConnectionResetError:
        pass
    return data


async def flood(writer: asyncio.StreamWriter, data: bytes, times: int) -> bool:
    """Write without reading; tell whether the peer has hung up."""
    try:
        for _ in range(times):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        return True
    return False


def test_pings_of_a_peer_that_does_not_read_fill_no_memory() -> None:
    async def test() -> None:
        async with serving(replace(CONFIG, addresses=GENEROUS)) as server:
            _, writer = await opened(server, request=listen("codes"))
            [one] = server._sockets
            transport, most = one._ws.transport, 0

            async def watch() -> None:
                nonlocal most
                while True:
                    most = max(most, transport.get_write_buffer_size())
                    await asyncio.sleep(0)

            watching = asyncio.create_task(watch())
            assert await flood(writer, frame(9, bytes(125)) * 400, 400)  # 20 MB
            watching.cancel()
            assert most < 2 * BACKLOG
            while server._sockets:
                await asyncio.sleep(0.01)
            async with peer(server, publish()):  # others are as before
                pass
            writer.close()

    run(test)


def test_pings_count_as_messages_and_a_few_are_answered() -> None:
    async def test() -> None:
        limits = AddressLimits(messages=10, burst=2)
        async with serving(replace(CONFIG, addresses=limits), clock=lambda: 1) as server:
            reader, writer = await opened(server)
            writer.write(frame(9, b"?") * 20)
            assert await reader.readexactly(3 * 20) == b"\x8a\x01?" * 20
            writer.write(frame(9, b"?"))
            assert b"\x88" not in await ended(reader)
            writer.close()

    run(test)


@pytest.mark.parametrize(
    ("host", "welcome"),
    [
        ("localhost:8765", True),
        ("127.0.0.1", True),
        ("[::1]:8765", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example:8765", False),
        ("localhost@evil.example", False),
        ("[::1", False),
        ("friend.example", True),
    ],
)
def test_a_page_is_not_ours_by_a_name_that_others_own(host: str, welcome: bool) -> None:
    origins = ("https://friend.example",)
    server = Server(replace(CONFIG, origins=origins))
    scheme = "https" if host == "friend.example" else "http"

    class Asking:
        subprotocol = SUBPROTOCOL

        class request:
            headers = Headers({"Host": host, "Origin": f"{scheme}://{host}"})

    refusal: Any = server._refusal(Asking(), allowed=True)  # type: ignore[arg-type]
    assert (refusal is None) == welcome
    assert welcome or refusal[0] is Code.BAD_ORIGIN


@pytest.mark.parametrize(
    ("header", "code"),
    [("Host: a", Code.BAD_ORIGIN), ("Authorization: b", Code.BAD_TOKEN)],
)
def test_headers_that_come_twice_are_refused_by_code(header: str, code: Code) -> None:
    async def test() -> None:
        async with serving() as server:
            others = [] if header.startswith("Host") else ["Host: 127.0.0.1"]
            reader, writer = await opened(server, *others, header, header)
            said = await ended(reader)
            assert said[0] == 0x88
            assert int.from_bytes(said[2:4], "big") == code
            assert header.partition(":")[0].encode() in said
            writer.close()

    run(test)


def test_the_last_stranger_of_all_forwarding_lines_is_who_connects() -> None:
    async def test() -> None:
        config = replace(CONFIG, proxies=("127.0.0.1", "10.0.0.1"))
        async with serving(config) as server:
            lines = ["X-Forwarded-For: 9.9.9.9", "X-Forwarded-For: 8.8.8.8, 7.7.7.7", "X-Forwarded-For: 10.0.0.1"]
            _, writer = await opened(server, "Host: 127.0.0.1", *lines, request=publish())
            assert [one.address for one in server._sockets] == ["7.7.7.7"]
            writer.close()
            _, writer = await opened(server, "Host: 127.0.0.1", request=publish(room="b"))
            assert "127.0.0.1" in [one.address for one in server._sockets]
            writer.close()

    run(test)


def test_half_open_connections_of_an_address_are_bounded() -> None:
    async def test() -> None:
        async with serving(replace(CONFIG, addresses=AddressLimits(connections=4, others=8))) as server:
            ends = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(40)]
            gone = 0
            for reader, _ in ends:
                try:
                    async with asyncio.timeout(0.02):
                        gone += await reader.read(1) == b""
                except ConnectionResetError:
                    gone += 1
                except TimeoutError:
                    pass
            assert gone == 40 - 12
            for _, writer in ends:
                writer.close()
            while server.gate._addresses["127.0.0.1"].sockets:
                await asyncio.sleep(0.01)
            async with peer(server, publish()):
                pass
            server.config = replace(server.config, proxies=("127.0.0.1",))  # which carry many
            ends = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(40)]
            await asyncio.sleep(0.1)
            assert server.gate._addresses["127.0.0.1"].sockets == 40
            for _, writer in ends:
                writer.close()

    run(test)


def test_requests_are_bounded_but_for_probes_of_this_machine() -> None:
    async def status(server: Server, path: str, *headers: str) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write("\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode())
        first = await reader.readline()
        writer.close()
        return int(first.split()[1])

    async def test() -> None:
        config = replace(CONFIG, addresses=AddressLimits(requests=2, burst=2), proxies=("127.0.0.1",))
        async with serving(config, clock=lambda: 1) as server:
            assert [await status(server, "/none") for _ in range(6)] == [404] * 4 + [429] * 2
            for path in ("/healthz", "/readyz", "/metrics"):
                assert await status(server, path) == 200
            there = "X-Forwarded-For: 1.2.3.4"
            assert [await status(server, "/healthz", there) for _ in range(6)] == [200] * 4 + [429] * 2

    run(test)


def test_addresses_with_a_tcp_connection_are_remembered_and_few_are_not_looked_through() -> None:
    gate = Gate(AddressLimits(known=2))
    gate.connect("a", 0)
    for i in range(3):
        gate.enter(str(i), 0)
        gate.leave(str(i))
    assert list(gate._addresses) == ["a", "2"]
    gate.disconnect("a")


def test_the_table_is_not_looked_through_while_it_is_small() -> None:
    class Unseen(OrderedDict[str, Any]):
        def items(self) -> Any:
            raise AssertionError("looked through")

    gate = Gate(AddressLimits(known=1))
    gate._addresses = Unseen()
    gate.enter("a", 0)
    gate.leave("a")
    gate.enter("b", 0)
    with pytest.raises(AssertionError, match="looked through"):
        gate.leave("b")


def test_messages_of_unknown_types_are_a_metric() -> None:
    async def test() -> None:
        async with serving() as server:
            async with peer(server, publish()) as one:
                for _ in range(3):
                    await one.ws.send(b"\x81\x00\x63")
                await one.say(publish())  # in the wrong order: the end
                assert (await one.closed())[0] == Code.WRONG_ORDER
            while server._sockets:
                await asyncio.sleep(0.01)
            assert b"semanticodec_ignored_messages_total 3.0" in server.metrics.text()

    run(test)


def test_a_server_whose_engine_dies_sends_everybody_away_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = []

    class Mortal(Server):
        def __init__(self, config: Config) -> None:
            super().__init__(config, load=models)
            servers.append(self)

    async def test() -> None:
        monkeypatch.setattr("server.shell.Server", Mortal)
        task = asyncio.create_task(shell.run(CONFIG))
        while not servers or servers[0].engine.models is None:
            await asyncio.sleep(0.02)
        server = servers[0]
        async with peer(server, publish(send="codes", room="r")) as codes, peer(server, publish(room="s")) as audio:
            monkeypatch.setattr(server.engine, "_choose", lambda: 1 / 0)
            await audio.say(Audio(0, 0, bytes(4)))
            assert (await audio.closed())[0] == Code.INTERNAL
            assert (await codes.closed())[0] == Code.ELSEWHERE  # a session that needs no engine can go on elsewhere
        assert not await task
        assert "semanticodec_ready 0.0" in server.metrics.text().decode()

    run(test)
