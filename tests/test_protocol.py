"""``server/PROTOCOL.md`` says what the code does: tables, bounds, states, and every byte of every example."""

import ast
import dataclasses
import re
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

from semanticodec.wire import messages, pack
from semanticodec.wire.blocks import coding_features, frame_bytes
from semanticodec.wire.closing import Code
from semanticodec.wire.fields import layout
from semanticodec.wire.messages import FEATURES, MESSAGES, SUBPROTOCOL, Codes, decode, encode
from server.connection import CONNECTION_MOVES, State
from server.session import SESSION_MOVES, SessionState

PAGE = (Path(__file__).resolve().parent.parent / "server" / "PROTOCOL.md").read_text()
PROSE = " ".join(PAGE.split())
BY_NAME = {kind.__name__: kind for kind in MESSAGES}
SENT = {"client": "client to server", "server": "server to client", "both": "both ways"}


def table(text: str, head: str) -> list[list[str]]:
    """Return the rows of the first table in ``text`` whose head begins with ``head``."""
    lines = text[text.index(f"\n| {head}") + 1 :].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def sections() -> dict[str, str]:
    parts = re.split(r"^### ", PAGE[PAGE.index("\n## Messages") : PAGE.index("\n## Close codes")], flags=re.M)[1:]
    return {part.split(" ", 1)[0]: part for part in parts}


def default(value: object) -> str:
    if value is dataclasses.MISSING:
        return "required"
    return "absent" if value in (None, (), b"") else str(value).lower() if isinstance(value, bool) else str(value)


def test_every_message_has_its_section_in_order():
    assert list(sections()) == [kind.__name__.lower() for kind in MESSAGES]


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__.lower())
def test_the_fields_of(kind: type[messages.Message]):
    section = sections()[kind.__name__.lower()]
    assert section.splitlines()[0] == f"{kind.__name__.lower()} ({kind.type}, {SENT[kind.sender]})"
    assert [row[:4] for row in table(section, "key")] == [
        [str(field.key), field.name, field.rule.wanted, default(field.default)] for field in layout(kind)
    ]
    assert all(row[4] for row in table(section, "key"))
    assert "```example" in section, "every message shows its bytes"


def examples() -> list[tuple[str, bytes]]:
    found = []
    for block in re.findall(r"^```example\n(.*?)^```", PAGE, flags=re.M | re.S):
        head, *lines = block.splitlines()
        found.append((head, bytes.fromhex("".join(line.split("  ", 1)[0] for line in lines))))
    return found


@pytest.mark.parametrize(("call", "data"), examples(), ids=range(len(examples())))
def test_the_bytes_of_example(call: str, data: bytes):
    tree = ast.parse(call, mode="eval").body
    assert isinstance(tree, ast.Call)
    assert isinstance(tree.func, ast.Name)
    fields = {keyword.arg: ast.literal_eval(keyword.value) for keyword in tree.keywords}
    message = BY_NAME[tree.func.id](**fields)
    assert encode(message) == data
    assert decode(data) == message


def test_the_packed_block():
    found = re.search(r"example `(.*?)` with\s+(12 and 13) bits per code is\s+`([0-9a-f ]+)`", PROSE)
    assert found is not None
    codes, widths, packed = found.groups()
    bits = [int(width) for width in widths.split(" and ")]
    assert pack(np.array([ast.literal_eval(codes)]), bits) == bytes.fromhex(packed)


def test_the_bounds():
    rows = table(PAGE, "limit")
    assert len(rows) == 8
    for name, value in rows:
        assert getattr(messages, name) == int(value), name


def test_the_close_codes():
    assert table(PAGE, "code | name") == [[str(int(c)), c.name, c.meaning, c.retry] for c in Code]


def test_the_overhead():
    for blocks, size, whole, framed, *rates in table(PAGE, "blocks"):
        count = int(blocks)
        for rate, found in zip((None, 50), rates, strict=True):
            message = len(encode(Codes(1000, bytes((25 if rate else 50) * count), rate=rate)))
            server, client = frame_bytes(message, masked=False), frame_bytes(message, masked=True)
            bits = [round(8 * octets / (0.32 * count)) for octets in (server, client)]
            assert found == f"{bits[0]} ({bits[1]})"
            if rate is None:
                assert (size, whole, framed) == (str(50 * count), str(message), f"{server} ({client})")


def moves(diagram: str, states: type[Enum]) -> set[tuple[object, object]]:
    """Read the arrows of a mermaid diagram."""
    arrows = re.findall(r"^\s+(\S+) --> (\w+|\[\*\])", diagram, flags=re.M)
    return {(states(a), states(b)) for a, b in arrows if "[*]" not in (a, b)}


def test_the_state_diagrams():
    connection, session = re.findall(r"```mermaid\n(.*?)```", PAGE, flags=re.S)
    assert moves(connection, State) == CONNECTION_MOVES
    assert moves(session, SessionState) == SESSION_MOVES
    for state in State:
        assert f"* **{state.value}**" in PAGE or state is State.CLOSED


def test_the_name_and_the_features():
    assert f"Sub-protocol **`{SUBPROTOCOL}`**" in PAGE
    known = PROSE[PROSE.index("Known ones:") : PROSE.index("A client on a thin link")]
    known = known[: known.index("Besides")] if "Besides" in known else known
    assert re.findall(r"`(\w+)`", known) == list(FEATURES)
    assert all(re.fullmatch("entropy-[0-9a-f]{8}", name) for name in coding_features())
    assert "`entropy-`" in PROSE


def test_every_code_that_is_mentioned_exists():
    mentioned = set(re.findall(r"`([A-Z_]{4,})`", PAGE))
    assert mentioned <= {code.name for code in Code} | {"MAX_GAP"}
    assert "OVERRUN" in mentioned
