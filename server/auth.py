"""Who may do what: bearer tokens, kept as hashes."""

from __future__ import annotations

import hashlib
import hmac
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from semanticodec.errors import ConfigError
from semanticodec.wire.messages import ROLES, Hello, Role


@dataclass(frozen=True)
class Grant:
    """What the bearer of a token may do.

    Args:
        name: of the token, for logs; it owns the sessions that are begun with it.
        sha256: of the token, in hexadecimal.
        roles: allowed ones.
        rooms: what the names of rooms must begin with.
        sessions: at a time.
    """

    name: str
    sha256: str = ""
    roles: tuple[Role, ...] = ROLES
    rooms: str = ""
    sessions: int = 16

    def refusal(self, hello: Hello) -> str | None:
        """Say why this is not allowed, or None."""
        if hello.role not in self.roles:
            return f"this token allows {', '.join(self.roles)}; {hello.role} was asked for"
        if hello.room is not None and not hello.room.startswith(self.rooms):
            return f"this token's rooms begin with {self.rooms!r}"
        return None


ANYBODY = Grant("", sessions=1 << 30)
"""Who comes without a token where none are needed."""


class Tokens:
    """The grants of a server; without any, everybody may do everything."""

    def __init__(self, grants: Sequence[Grant] = ()) -> None:
        self._grants = tuple(grants)

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """Read ``{"tokens": [{"name": ..., "sha256": ..., "roles": [...], "rooms": ..., "sessions": ...}]}``.

        Args:
            path: JSON, or TOML if it is called so.

        Raises:
            ConfigError: the file is not like that.
            OSError: it cannot be read.
        """
        text = path.read_text()
        try:
            data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
            grants = [_grant(entry) for entry in data["tokens"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a list of tokens: {error!r}") from error
        if not grants or len({grant.name for grant in grants}) < len(grants):
            raise ConfigError(f"{path} needs tokens with different names")
        return cls(grants)

    def check(self, token: str | None) -> Grant | None:
        """Return what a token allows, or None; the time that takes does not tell which part of it is right."""
        if not self._grants:
            return ANYBODY
        digest = hash_token(token or "")
        found = None
        for grant in self._grants:
            if hmac.compare_digest(grant.sha256, digest):
                found = grant
        return found


def hash_token(token: str) -> str:
    """Return what is kept of a token.  Tokens are long random strings, so that a plain hash is enough."""
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def bearer(header: str | None) -> str | None:
    """Return the token of an ``Authorization`` header."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _grant(entry: dict[str, Any]) -> Grant:
    known = {field.name for field in fields(Grant)}
    if not {"name", "sha256"} <= set(entry) <= known:
        raise ValueError(f"an entry has {sorted(entry)}; name and sha256 are needed, {sorted(known)} are known")
    grant = Grant(**{**entry, "roles": tuple(entry.get("roles", ROLES))})
    digest = grant.sha256.lower()
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ValueError(f"the sha256 of {grant.name!r} is no 64 hexadecimal digits")
    if not grant.name or not set(grant.roles) <= set(ROLES) or type(grant.sessions) is not int:
        raise ValueError(f"{grant.name!r} has roles {grant.roles} and {grant.sessions!r} sessions")
    return Grant(grant.name, digest, grant.roles, str(grant.rooms), grant.sessions)
