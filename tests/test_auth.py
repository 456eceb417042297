"""Tokens, grants, and what one address may take."""

from __future__ import annotations

import hmac
import json
from pathlib import Path
from typing import Any

import pytest

from semanticodec.errors import ConfigError
from semanticodec.wire.messages import Hello
from server import auth
from server.auth import ANYBODY, Grant, Tokens, bearer, hash_token
from server.gate import AddressLimits, Gate
from server.limits import SECOND

HASH = hash_token("secret")


def read(tmp_path: Path, entries: Any, name: str = "tokens.json") -> Tokens:
    path = tmp_path / name
    path.write_text(entries if isinstance(entries, str) else json.dumps({"tokens": entries}))
    return Tokens.read(path)


def test_files_of_tokens(tmp_path: Path) -> None:
    entry = {"name": "a", "sha256": HASH.upper(), "roles": ["publish"], "rooms": "x-", "sessions": 2}
    assert read(tmp_path, [entry]).check("secret") == Grant("a", HASH, ("publish",), "x-", 2)
    toml = f'[[tokens]]\nname = "b"\nsha256 = "{HASH}"\n'
    assert read(tmp_path, toml, "tokens.toml").check("secret") == Grant("b", HASH)


@pytest.mark.parametrize(
    "entries",
    [
        "",
        "[1",
        "[]",
        [],
        [{"name": "a"}],
        [{"name": "", "sha256": HASH}],
        [{"name": "a", "sha256": "secret"}],
        [{"name": "a", "sha256": HASH, "role": "publish"}],
        [{"name": "a", "sha256": HASH, "roles": ["admin"]}],
        [{"name": "a", "sha256": HASH, "sessions": "many"}],
        [{"name": "a", "sha256": HASH}] * 2,
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, entries: Any) -> None:
    with pytest.raises(ConfigError):
        read(tmp_path, entries)


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    tokens = Tokens([Grant(str(i), hash_token(str(i))) for i in range(5)])
    for token in ("0", "4", "wrong", None, "\ud800"):
        compared.clear()
        grant = tokens.check(token)
        assert (grant.name if grant else None) == (token if token in {"0", "4"} else None)
        assert len(compared) == 5  # every one, wherever the right one stands
    assert hmac.compare_digest("a", "a")


def test_without_tokens_everybody_may_do_everything() -> None:
    assert Tokens().check(None) is ANYBODY
    assert ANYBODY.refusal(Hello("publish", "codes", room="any")) is None


def test_what_a_grant_allows() -> None:
    grant = Grant("a", HASH, ("publish", "transcode"), "team-")
    assert grant.refusal(Hello("publish", "codes", room="team-x")) is None
    assert grant.refusal(Hello("transcode", "audio", ("codes",))) is None
    assert "begin with" in str(grant.refusal(Hello("publish", "codes", room="tea")))
    assert "subscribe" in str(grant.refusal(Hello("subscribe", receive=("codes",), room="team-x")))


@pytest.mark.parametrize(
    ("header", "token"),
    [(None, None), ("", None), ("Basic abc", None), ("Bearer", None), ("bearer  abc ", "abc"), ("Bearer a b", "a b")],
)
def test_headers(header: str | None, token: str | None) -> None:
    assert bearer(header) == token


class TestGate:
    def test_connections_and_their_rate(self) -> None:
        gate = Gate(AddressLimits(connections=3, opens=1, burst=2))
        assert [gate.enter("a", 0) for _ in range(3)] == [True, True, False]
        gate.leave("a")
        assert gate.enter("a", SECOND)
        assert not gate.enter("a", 9 * SECOND)  # the fourth at a time
        assert gate.enter("b", 9 * SECOND)

    def test_messages_and_bytes(self) -> None:
        gate = Gate(AddressLimits(messages=2, octets=100, burst=1))
        assert gate.message("a", 60, 0)
        assert not gate.message("a", 60, 0)
        assert gate.message("a", 60, SECOND)
        assert gate.message("b", 60, 0)

    def test_sessions(self) -> None:
        gate = Gate(AddressLimits(sessions=1))
        assert gate.begin("a", 0)
        assert not gate.begin("a", 0)
        gate.end("a")
        assert gate.begin("a", 0)

    def test_guesses(self) -> None:
        gate = Gate(AddressLimits(failures=1, burst=2))
        for _ in range(3):
            assert gate.guess("a", 0)
            gate.failed("a", 0)
        assert not gate.guess("a", 0)
        assert gate.guess("b", 0)
        assert gate.guess("a", 2 * SECOND)

    def test_strangers_are_forgotten(self) -> None:
        gate = Gate(AddressLimits(known=10))
        gate.enter("here", 0)
        for i in range(100):
            gate.enter(str(i), 0)
            gate.leave(str(i))
        assert len(gate._addresses) == 10
        assert "here" in gate._addresses
