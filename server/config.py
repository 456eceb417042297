"""What a server can be told, in one value."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from semanticodec.errors import ConfigError

from .auth import Tokens
from .engine import Work
from .gate import AddressLimits
from .limits import Limits


def web_folder() -> Path:
    """Return where the page is: beside this package, whose neighbour has another name once it is installed."""
    here = Path(__file__).resolve().parent.parent
    folders = [here / name / "web" for name in ("client", "semanticodec_client")]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


@dataclass(frozen=True)
class Config:
    """How to serve.

    Args:
        host: address to listen on.
        port: 0 takes a free one.
        presets: of one family, the first is the default.
        device: to compute on.
        work: how the engine works.
        limits: of each session and connection.
        addresses: what one address may take.
        connections: at a time, from everywhere.
        tokens: who may do what.
        origins: of web pages that may connect; our own may anyway where its address is localhost, an IP address or
            ``host``: any other name could be made to point here by somebody else's page.
        proxies: addresses of proxies whose ``X-Forwarded-For`` is believed.
        certificate: files with certificate and key, for TLS.
        drain: seconds for clients to leave before the server ends.
        elsewhere: ws:// or wss:// address where clients go on then.
        backplane: redis:// address of what several servers share.
        web: folder of the page.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    presets: tuple[str, ...] = ("mini-100", "mini-50", "mini-25")
    device: str = "cpu"
    work: Work = field(default_factory=Work)
    limits: Limits = field(default_factory=Limits)
    addresses: AddressLimits = field(default_factory=AddressLimits)
    connections: int = 4096
    tokens: Tokens = field(default_factory=Tokens)
    origins: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    certificate: tuple[Path, Path] | None = None
    drain: float = 10.0
    elsewhere: str | None = None
    backplane: str | None = None
    web: Path = field(default_factory=web_folder)

    def tls(self) -> ssl.SSLContext | None:
        """Return how to encrypt, or None.

        Raises:
            ConfigError: the files are no certificate and its key.
        """
        if self.certificate is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(*self.certificate)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{self.certificate[0]} and {self.certificate[1]} are not usable: {error}") from error
        return context
