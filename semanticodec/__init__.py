"""Code speech, music and any other sound at 0.3 to 1.4 kbps.

:class:`SemantiCodec` is the codec; everything else is a value that goes into it, or an error that comes out of it.
Names that need torch are loaded on first use, so that a program that only handles bytes or errors never pays for it.
"""

from typing import TYPE_CHECKING

from .config import PRESETS, CodecConfig, preset
from .errors import (
    AudioError,
    CheckpointError,
    CodesError,
    ConfigError,
    CorruptedError,
    CutWarning,
    LicenceWarning,
    SemantiCodecError,
    StreamError,
    TokensError,
    TruncatedError,
    VersionError,
    WireError,
)
from .tokens import TokenDecoder, Vocabulary

if TYPE_CHECKING:
    from .codec import SemantiCodec
    from .corpus import CorpusOptions, tokenize_corpus, verify_corpus
    from .datasets import TokenDataset
    from .diffusion import SamplerOptions
    from .generation import Generator
    from .streaming import Decoder, Encoder, Sliding, StreamDecoder, StreamEncoder
    from .superres import SuperResolution
else:
    _LAZY = {
        "CorpusOptions": "corpus",
        "Decoder": "streaming",
        "Encoder": "streaming",
        "Generator": "generation",
        "SamplerOptions": "diffusion",
        "SemantiCodec": "codec",
        "Sliding": "streaming",
        "StreamDecoder": "streaming",
        "StreamEncoder": "streaming",
        "SuperResolution": "superres",
        "TokenDataset": "datasets",
        "tokenize_corpus": "corpus",
        "verify_corpus": "corpus",
    }

    def __getattr__(name):
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})


__all__ = [
    "PRESETS",
    "AudioError",
    "CheckpointError",
    "CodecConfig",
    "CodesError",
    "ConfigError",
    "CorpusOptions",
    "CorruptedError",
    "CutWarning",
    "Decoder",
    "Encoder",
    "Generator",
    "LicenceWarning",
    "SamplerOptions",
    "SemantiCodec",
    "SemantiCodecError",
    "Sliding",
    "StreamDecoder",
    "StreamEncoder",
    "StreamError",
    "SuperResolution",
    "TokenDataset",
    "TokenDecoder",
    "TokensError",
    "TruncatedError",
    "VersionError",
    "Vocabulary",
    "WireError",
    "preset",
    "tokenize_corpus",
    "verify_corpus",
]
