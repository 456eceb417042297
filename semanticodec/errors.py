"""The exception tree.

SemantiCodecError
├── AudioError       (ValueError)    audio that cannot be read or makes no sense
├── CodesError       (ValueError)    codes of the wrong shape, dtype or range
├── TokensError      (ValueError)    tokens of a language model that are no sequence of their layout
├── ConfigError      (ValueError)    an unknown preset, or values that do not fit together
├── CheckpointError  (RuntimeError)  weights that are missing, damaged or of another architecture
├── StreamError      (RuntimeError)  a stepping object used out of order
└── WireError        (ValueError)    bytes that are not what the format says
    ├── TruncatedError               the bytes end too early
    ├── CorruptedError               a checksum or a length does not hold
    └── VersionError                 written by a format version this package does not know

Messages say what was seen, what was wanted and what to do.  Our own warnings are :class:`LicenceWarning` and
:class:`CutWarning`.
"""


class SemantiCodecError(Exception):
    """Base class of every error this package raises on purpose."""


class AudioError(SemantiCodecError, ValueError):
    """Audio that cannot be read or makes no sense."""


class CodesError(SemantiCodecError, ValueError):
    """Codes of the wrong shape, dtype or range."""


class TokensError(SemantiCodecError, ValueError):
    """Tokens of a language model that are no sequence of their layout.

    Attributes:
        position: of the token, from 0 at the beginning of the sequence; the number of tokens if it ends too early.
    """

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


class ConfigError(SemantiCodecError, ValueError):
    """An unknown preset, or values that do not fit together."""


class CheckpointError(SemantiCodecError, RuntimeError):
    """Weights that are missing, damaged or of another architecture."""


class StreamError(SemantiCodecError, RuntimeError):
    """A stepping object used out of order."""


class WireError(SemantiCodecError, ValueError):
    """Bytes that are not what the format says."""


class TruncatedError(WireError):
    """The bytes end before the format says they may."""


class CorruptedError(WireError):
    """A checksum or a length does not hold."""


class VersionError(WireError):
    """Bytes written by a format version this package does not know."""


class LicenceWarning(UserWarning):
    """Weights that may not be used commercially are being loaded."""


class CutWarning(UserWarning):
    """Part of a text is not read."""
