"""Phonemes: the table of symbols, the front end, and the text encoder of VITS."""

from __future__ import annotations

import math
import shutil
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from prompting import PHONEMES
from tiny import fill, noise

from semanticodec.conditioners import phonemes
from semanticodec.conditioners.phonemes import SYMBOLS, Phonemes, clean, phonemize, symbol_ids
from semanticodec.errors import ConfigError, CutWarning
from semanticodec.nn.phonemes import RelativeAttention

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")


@pytest.fixture(scope="module")
def front() -> Phonemes:
    module = Phonemes(PHONEMES)
    fill(module)
    return module.requires_grad_(False).eval()


def test_symbols_of_vits() -> None:
    assert len(SYMBOLS) == 178
    assert symbol_ids("_; Aazɑˈᵻ") == [0, 1, 16, 17, 43, 68, 69, 156, 177, 182]
    assert symbol_ids("'") == [176, 182], "the later of two places"
    assert symbol_ids("a\u4e00b") == [43, 44, 182]


def test_clean() -> None:
    assert clean("Mr. Smith’s   CAFÉ, St. Ives\n") == "mister smith's cafe, saint ives"
    assert clean("\u4e00") == ""
    assert clean("first. comr.") == "first. comr."


@needs_espeak
def test_phonemize() -> None:
    assert phonemize("Hello, world!") == "həlˈoʊ, wˈɜːld!"
    assert phonemize("Dr. Who?") == phonemize("doctor who?") == "dˈɑːktɚ hˈuː?"
    assert phonemize(" ") == ""


def test_words_in_other_scripts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phonemes, "_espeak", lambda: SimpleNamespace(phonemize=lambda texts, strip: texts))  # noqa: ARG005
    with pytest.warns(CutWarning, match="'Привет', 'Straße'") as told:
        assert phonemize("Say Привет in the naïve Straße — “now”") == 'say in the naive strae - "now"'
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        phonemize("The naïve café, “½” full…")


@needs_espeak
def test_a_row_is_the_same_in_any_batch(front: Phonemes) -> None:
    texts = ["Good morning.", "", "She sells sea shells by the sea shore, and I bought them all."]
    with pytest.warns(CutWarning):
        ids, mask = front.tokenize(texts)
    assert ids.shape == mask.shape == (3, 30)
    assert mask.sum(1).tolist() == [len(symbol_ids(phonemize(texts[0]))), 0, 30]
    assert ids[0, int(mask[0].sum()) - 1] == 182
    assert not ids[1].any()
    assert not (ids[0] * (1 - mask[0])).any()
    with pytest.warns(CutWarning):
        states, seen = front.text(texts)
    for row, text in enumerate(texts):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CutWarning)
            alone, one = front.text([text])
        assert torch.equal(one[0], seen[row])
        torch.testing.assert_close(alone[0], states[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["你好", "你好, 世界!", "Привет мир", "_"])
def test_what_cannot_be_spoken_is_refused(front: Phonemes, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Not even espeak is asked for most; of "_" it says nothing."""
    monkeypatch.setattr(phonemes, "_espeak", lambda: SimpleNamespace(phonemize=lambda _, strip: [""]))  # noqa: ARG005
    with pytest.raises(ConfigError, match=rf"nothing in '{text}' can be spoken.*Latin letters"):
        front.tokenize(["", text])


def test_how_much_is_not_read_is_told_once(front: Phonemes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of n letters is n symbols and the end."""
    monkeypatch.setattr(phonemes, "phonemize", str)
    texts = ["a" * 29, "b" * 30, "c" * 99]
    with pytest.warns(CutWarning) as told:
        ids, mask = front.tokenize(texts)
    assert len(told) == 1
    said = str(told[0].message)
    assert "1 of 31 ('bbb" in said
    assert "70 of 100 ('ccc" in said
    assert "aaa" not in said
    assert mask.sum(1).tolist() == [30, 30, 30]
    assert [int((row == 182).sum()) for row in ids] == [1, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        front.tokenize(texts[:1])


def test_where_nothing_is_said_there_are_only_positions(front: Phonemes) -> None:
    ids = torch.randint(1, 183, (1, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 30)
    mask[:, 12:] = 0
    states = front.encoder(ids, mask)
    positions = front.encoder.positions.mT
    assert torch.equal(states[:, 12:], positions[:, 12:])
    assert (states[:, :12] - positions[:, :12]).abs().mean() > 0.1
    ids[:, 12:] = 5
    assert torch.equal(front.encoder(ids, mask), states)


def test_attention_knows_distances_up_to_the_window() -> None:
    attention = RelativeAttention(8, 2, 2)
    fill(attention)
    x = noise(1, 8, 6)
    q, k, v = (part(x)[0].reshape(2, 4, 6).mT for part in (attention.q, attention.k, attention.v))
    out = torch.zeros(2, 6, 4)
    for head in range(2):
        for i in range(6):
            near = [attention.relative_k[j - i + 2] if abs(j - i) <= 2 else torch.zeros(4) for j in range(6)]
            scores = torch.stack([q[head, i] @ (k[head, j] + near[j]) for j in range(6)]) / math.sqrt(4)
            weights = scores.softmax(0)
            for j in range(6):
                extra = attention.relative_v[j - i + 2] if abs(j - i) <= 2 else 0
                out[head, i] += weights[j] * (v[head, j] + extra)
    want = attention.o(out.mT.reshape(1, 8, 6))
    torch.testing.assert_close(attention(x, torch.ones(1, 1, 6, 6)), want, rtol=1e-5, atol=1e-5)


def test_missing_parts_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    phonemes._espeak.cache_clear()
    monkeypatch.setitem(sys.modules, "phonemizer.backend", None)
    with pytest.raises(ConfigError, match=r"semanticodec\[speech\].*espeak-ng"):
        phonemize("hello")
