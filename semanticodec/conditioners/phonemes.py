"""English text to the symbols of VITS, as AudioLDM 2's speech models read them.  B batch, L symbols."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
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

    Raises:
        ConfigError: phonemizer or espeak-ng is not installed.
    """
    cleaned = clean(text)
    if not cleaned:
        return ""
    return " ".join(_espeak().phonemize([cleaned], strip=True)[0].split())


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
        """Return ids int64 ``[B, length]`` and their mask; longer transcriptions are cut.

        An empty transcription is all padding: it asks for nothing.

        Raises:
            ConfigError: phonemizer or espeak-ng is not installed.
        """
        ids = torch.full((len(transcriptions), self.config.length), PAD)
        mask = torch.zeros(len(transcriptions), self.config.length)
        for row, text in enumerate(transcriptions):
            phonemes = phonemize(text)
            if phonemes:
                found = symbol_ids(phonemes)[: self.config.length]
                ids[row, : len(found)] = torch.tensor(found)
                mask[row, : len(found)] = 1
        return ids, mask

    def text(self, transcriptions: Sequence[str]) -> Context:
        """Encode transcriptions.

        Returns:
            ``[B, length, D]`` and the mask ``[B, length]``.

        Raises:
            ConfigError: phonemizer or espeak-ng is not installed.
        """
        ids, mask = (x.to(self.encoder.positions.device) for x in self.tokenize(transcriptions))
        states: Tensor = self.encoder(ids, mask)
        return states, mask.to(states.dtype)
