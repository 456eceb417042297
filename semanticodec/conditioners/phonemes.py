"""English text to the symbols of VITS, as AudioLDM 2's speech models read them.  B batch, L symbols."""

from __future__ import annotations

import functools
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, CutWarning
from ..nn.phonemes import PhonemeEncoder
from .config import PhonemeConfig
from .sequence import Context

SYMBOLS = (
    "_"
    ';:,.!?¡¿—…"«»“” '
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    "ɑɐɒæɓʙβɔɕçɗɖðʤəɘɚɛɜɝɞɟʄɡɠɢʛɦɧħɥʜɨɪʝɭɬɫɮʟɱɯɰŋɳɲɴøɵɸθœɶʘɹɺɾɻʀʁɽʂʃʈʧʉʊʋⱱʌɣɤʍχʎʏʑʐʒʔʡʕʢǀǁǂǃˈˌːˑʼʴʰʱʲʷˠˤ˞↓↑→↗↘'̩'ᵻ"
)
"""The 178 symbols of VITS; the first one pads.  A symbol that is there twice has the later place."""
PAD, END = 0, 182
_IDS = {symbol: index for index, symbol in enumerate(SYMBOLS)}
_SHORT = {
    "capt": "captain",
    "co": "company",
    "col": "colonel",
    "dr": "doctor",
    "drs": "doctors",
    "esq": "esquire",
    "ft": "fort",
    "gen": "general",
    "hon": "honorable",
    "jr": "junior",
    "lt": "lieutenant",
    "ltd": "limited",
    "maj": "major",
    "mr": "mister",
    "mrs": "misess",
    "rev": "reverend",
    "sgt": "sergeant",
    "st": "saint",
}
_ABBREVIATION = re.compile(rf"\b({'|'.join(_SHORT)})\.")
_QUOTES = str.maketrans("‘’“”«»—–", '\'\'""""--')


def clean(text: str) -> str:
    """Return ``text`` in lower-case ASCII with abbreviations spelled out.

    Source: VITS's ``english_cleaners2`` before its phonemizer; it transliterates other scripts, which here are dropped.
    """
    plain = unicodedata.normalize("NFKD", text.translate(_QUOTES)).encode("ascii", "ignore").decode().lower()
    return " ".join(_ABBREVIATION.sub(lambda match: _SHORT[match[1]], plain).split())


@functools.cache
def _espeak() -> Any:
    try:
        from phonemizer.backend import EspeakBackend
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"speech needs {error.name}; install the extra: pip install 'semanticodec[speech]', and espeak-ng "
            "(Debian: apt-get install espeak-ng)"
        ) from error
    try:
        return EspeakBackend("en-us", preserve_punctuation=True, with_stress=True, words_mismatch="ignore")
    except RuntimeError as error:
        raise ConfigError(f"speech needs espeak-ng ({error}); Debian: apt-get install espeak-ng") from error


def phonemize(text: str) -> str:
    """Return American English in the International Phonetic Alphabet, with stress and punctuation.

    Letters and digits of other scripts are left out; a :class:`~semanticodec.errors.CutWarning` names the words.

    Raises:
        ConfigError: there is a text but nothing in it to read, or phonemizer or espeak-ng is not installed.
    """
    if not text.strip():
        return ""
    cleaned = clean(text)
    # Of a sentence in another script its punctuation may be left.
    wordless = any(map(str.isalnum, text)) and not any(map(str.isalnum, cleaned))
    phonemes = "" if wordless or not cleaned else " ".join(_espeak().phonemize([cleaned], strip=True)[0].split())
    if not phonemes:
        raise ConfigError(
            f"nothing in {text!r} can be spoken: English in Latin letters is read, with digits and punctuation, and "
            "other scripts are left out; write the text in Latin letters"
        )
    if foreign := [word for word in text.split() if any(map(_unread, unicodedata.normalize("NFKD", word)))]:
        warnings.warn(
            f"not all letters can be read of {', '.join(map(repr, foreign))}: write them in Latin letters",
            CutWarning,
            stacklevel=2,
        )
    return phonemes


def _unread(letter: str) -> bool:
    return letter.isalnum() and not letter.isascii()


def symbol_ids(phonemes: str) -> list[int]:
    """Return VITS's indices and the index of the end; what VITS does not know is left out."""
    return [*(_IDS[symbol] for symbol in phonemes if symbol in _IDS), END]


class Phonemes(nn.Module):
    """Encodes transcriptions: the second condition of the speech models' sequence generator."""

    def __init__(self, config: PhonemeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = PhonemeEncoder(**asdict(config))

    def tokenize(self, transcriptions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids int64 ``[B, length]`` and their mask.

        An empty transcription is all padding: it asks for nothing.  Longer ones are cut, the end symbol included, as
        published; a :class:`~semanticodec.errors.CutWarning` tells.

        Raises:
            ConfigError: as :func:`phonemize`.
        """
        ids = torch.full((len(transcriptions), self.config.length), PAD)
        mask = torch.zeros(len(transcriptions), self.config.length)
        lost = []
        for row, text in enumerate(transcriptions):
            phonemes = phonemize(text)
            if phonemes:
                every = symbol_ids(phonemes)
                found = every[: self.config.length]
                ids[row, : len(found)] = torch.tensor(found)
                mask[row, : len(found)] = 1
                if len(every) > len(found):
                    lost.append(f"{len(every) - len(found)} of {len(every)} ({text[:20]!r}...)")
        if lost:
            warnings.warn(
                f"{self.config.length} symbols of a transcription are read; not read, the end among them, are "
                f"{', '.join(lost)}: split it into sentences",
                CutWarning,
                stacklevel=2,
            )
        return ids, mask

    def text(self, transcriptions: Sequence[str]) -> Context:
        """Encode transcriptions.

        Returns:
            ``[B, length, D]`` and the mask ``[B, length]``.

        Raises:
            ConfigError: as :func:`phonemize`.
        """
        ids, mask = (x.to(self.encoder.positions.device) for x in self.tokenize(transcriptions))
        states: Tensor = self.encoder(ids, mask)
        return states, mask.to(states.dtype)
