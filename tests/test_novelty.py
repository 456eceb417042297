"""Novelty: nearest training clips, the figures, the kept embeddings, the page, and the command."""

from __future__ import annotations

import html
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from prompting import conditioner
from tiny import noise
from typer.testing import CliRunner

from semanticodec import audio, cli
from semanticodec.errors import AudioError, ConfigError
from semanticodec.novelty import (
    BINS,
    Clip,
    Embedded,
    Embedder,
    Novelty,
    compare,
    embed_file,
    mae_embedder,
    nearest,
    read,
    summary,
)
from semanticodec.novelty_page import page

RATE = 8000


def spectrum(wave: torch.Tensor) -> torch.Tensor:
    """A poor man's embedding: how loud 16 bands are."""
    return torch.fft.rfft(wave, n=RATE).abs().unfold(1, 250, 250).mean(-1)


LOUDNESS = Embedder("loudness", RATE, spectrum)


def tone(folder: Path, name: str, hertz: int, seconds: float = 1.0, rate: int = RATE) -> Path:
    time = torch.arange(round(seconds * rate)) / rate
    folder.mkdir(exist_ok=True)
    audio.save(folder / name, 0.5 * torch.sin(2 * torch.pi * hertz * time), rate)
    return folder / name


def found(similarity: list[float], files: tuple[Path, ...] = ()) -> Novelty:
    clips = tuple(Clip(files[i] if files else Path(f"{i}.wav"), 0, RATE) for i in range(len(similarity)))
    order = torch.arange(len(similarity)).flip(0)
    return Novelty("loudness", clips, clips, RATE, torch.tensor(similarity), order)


def test_nearest_is_the_largest_cosine() -> None:
    generated, training = noise(1500, 6), noise(40, 6, seed=1)
    similarity, index = nearest(generated, training)
    cosines = torch.cosine_similarity(generated[:, None], training[None], dim=-1)
    torch.testing.assert_close(similarity, cosines.amax(1))
    assert torch.equal(index, cosines.argmax(1))
    torch.testing.assert_close(nearest(7 * generated, training / 9)[0], similarity)


@pytest.mark.parametrize(("a", "b"), [((0, 4), (2, 4)), ((2, 4), (0, 4)), ((2, 4), (2, 5))])
def test_what_cannot_be_compared(a: tuple[int, int], b: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="cannot compare"):
        nearest(torch.ones(a), torch.ones(b))


def test_fractions_and_histogram() -> None:
    report = found([0.90, 0.949, 0.95, 1.0, -1.0, 0.1])
    assert report.fraction(0.9) == pytest.approx(4 / 6)
    assert report.fraction(0.95) == pytest.approx(2 / 6)
    assert sum(report.histogram) == 6
    assert {i: n for i, n in enumerate(report.histogram) if n} == {0: 1, 22: 1, 38: 2, 39: 2}
    assert len(report.histogram) == BINS
    assert report.closest == [3, 2, 1, 0, 5, 4]
    text = summary(report)
    assert "66.7%" in text
    assert "33.3%" in text
    assert "loudness" in text


def test_files_are_cut_into_clips(tmp_path: Path) -> None:
    long = embed_file(tone(tmp_path, "long.wav", 440, 20.3), LOUDNESS)
    assert [(clip.start, clip.samples) for clip in long.clips] == [(0, 80_000), (80_000, 80_000)]
    more = embed_file(tone(tmp_path, "more.wav", 440, 12.0), LOUDNESS)
    assert [(clip.start, clip.samples) for clip in more.clips] == [(0, 80_000), (80_000, 16_000)]
    short = embed_file(tone(tmp_path, "short.wav", 440, 0.1), LOUDNESS)
    assert [(clip.start, clip.samples) for clip in short.clips] == [(0, 800)]
    assert long.vectors.shape == (2, 16)
    torch.testing.assert_close(spectrum(read(long.clips[1], RATE)), long.vectors[1:])


def test_files_of_another_rate_and_more_channels(tmp_path: Path) -> None:
    mono = tone(tmp_path, "a.wav", 440, 2.0, 16_000)
    wave, _ = audio.load(mono)
    audio.save(tmp_path / "b.wav", torch.cat([1.4 * wave, 0.6 * wave]), 16_000)
    a, b = (embed_file(tmp_path / name, LOUDNESS) for name in ("a.wav", "b.wav"))
    assert a.clips[0].samples == 16_000
    torch.testing.assert_close(a.vectors, b.vectors, rtol=1e-2, atol=1e-2)


def test_compare_finds_the_copy(tmp_path: Path) -> None:
    training = [embed_file(tone(tmp_path, f"{hertz}.wav", hertz), LOUDNESS) for hertz in (300, 900, 2000)]
    made = [embed_file(tone(tmp_path, f"g{hertz}.wav", hertz), LOUDNESS) for hertz in (910, 3300)]
    report = compare(made, training, LOUDNESS)
    assert report.nearest[0] == 1
    assert report.similarity[0] > 0.95 > report.similarity[1]
    assert report.fraction(0.95) == 0.5
    with pytest.raises(ConfigError, match="seen 0 generated and 3 training files"):
        compare([], training, LOUDNESS)


def test_standardised_embeddings() -> None:
    """A constant that all vectors share makes everything look alike until it is taken away."""
    vectors = noise(12, 30) * torch.arange(1, 31) + 200
    sides = [
        [Embedded((Clip(Path(str(i)), 0, 1),), vectors[i : i + 1]) for i in rows] for rows in (range(2), range(2, 12))
    ]
    assert compare(*sides, LOUDNESS).similarity.min() > 0.99
    standard = compare(*sides, Embedder("loudness", RATE, spectrum, standardised=True))
    assert standard.similarity.max() < 0.9
    moved = (vectors - vectors[2:].mean(0)) / vectors[2:].std(0)
    torch.testing.assert_close(standard.similarity, nearest(moved[:2], moved[2:])[0])
    assert "standardised by" in summary(standard)
    with pytest.raises(ConfigError, match="seen 9 training clips"):
        compare(sides[0], sides[1][1:], Embedder("loudness", RATE, spectrum, standardised=True))


def test_embeddings_are_kept_by_content(tmp_path: Path) -> None:
    calls: list[int] = []

    def counting(name: str) -> Embedder:
        return Embedder(name, RATE, lambda wave: calls.append(1) or spectrum(wave))

    file, cache = tone(tmp_path, "a.wav", 440), tmp_path / "cache"
    first = embed_file(file, counting("one"), cache)
    again = embed_file(file, counting("one"), cache)
    assert len(calls) == 1
    assert torch.equal(first.vectors, again.vectors)
    assert first.clips == again.clips
    embed_file(file, counting("two"), cache)
    assert len(calls) == 2, "another embedder"
    tone(tmp_path, "a.wav", 450)
    embed_file(file, counting("one"), cache)
    assert len(calls) == 3, "another content"
    for kept in cache.iterdir():
        kept.write_bytes(b"damaged")
    embed_file(file, counting("one"), cache)
    assert len(calls) == 4


def test_embeddings_that_are_not_finite(tmp_path: Path) -> None:
    broken = Embedder("broken", RATE, lambda wave: spectrum(wave) * torch.nan)
    with pytest.raises(AudioError, match="by broken is not finite"):
        embed_file(tone(tmp_path, "a.wav", 440), broken)


def test_mini_features() -> None:
    codec = tiny.codec("mini")
    embedder = mae_embedder(codec)
    assert codec.weights_hash[:8] in embedder.name
    wave = noise(1, 16_000, scale=0.1)
    features = codec.features(wave, 16_000).reshape(1, -1, 8, codec.config.encoder.mae.dim)
    want = torch.cat([features.mean(1), features.var(1, correction=0).sqrt()], -1).flatten(1)
    torch.testing.assert_close(embedder.embed(wave), want)


def test_page_is_whole_and_asks_nothing_of_any_host(tmp_path: Path) -> None:
    files = tuple(tone(tmp_path, f"<{hertz}>.wav", hertz) for hertz in (300, 900, 2000))
    text = page(found([0.2, 0.97, 0.4], files), pairs=2)
    assert text.count("<audio") == 4
    assert re.findall(r"<td>(\d+)</td><td>([\d.]+)</td>", text) == [("1", "0.970"), ("2", "0.400")]
    assert html.escape(str(files[1])) in text
    assert str(files[1]) not in text
    assert set(re.findall(r'(?:src|href)="([a-z]+:[a-z/]+)', text)) == {"data:audio/mpeg"}
    assert "http" not in text
    assert "published for CLAP embeddings; here another" in text
    assert text.count('class="over"') == 2


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semanticodec.cli.novelty._mini", lambda _device: LOUDNESS)
    made, known, out = tmp_path / "made", tmp_path / "known", tmp_path / "out" / "page.html"
    for folder, pitches in ((made, (910, 3300)), (known, (300, 900))):
        for hertz in pitches:
            tone(folder, f"{hertz}.wav", hertz)
    arguments = ["novelty", str(made), str(known), "--out", str(out)]
    result = CliRunner().invoke(cli.app, arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "loudness" in result.stdout
    assert "50.0%" in result.stdout
    assert out.read_text().count("<audio") == 4
    assert len(list((out.parent / ".novelty").iterdir())) == 4
    page = out.read_bytes()
    result = CliRunner().invoke(cli.app, arguments)
    assert (result.exit_code, "--force" in result.stderr, out.read_bytes() == page) == (1, True, True)
    (made / "bad.wav").write_bytes(b"nothing")
    result = CliRunner().invoke(cli.app, [*arguments, "--force"])
    assert result.exit_code == 1
    assert "bad.wav" in result.stderr
    assert "2 generated" in result.stdout, "the rest is reported all the same"
    assert (
        CliRunner().invoke(cli.app, ["novelty", str(tmp_path / "none"), str(known), "-f", "-o", str(out)]).exit_code
        == 1
    )


def test_the_clap_of_a_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(row: Any, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(prompts=conditioner("film", tmp_path) if row.name == "musicldm" else None)

    monkeypatch.setattr("semanticodec.family.load_system", loaded)
    made, known, out = tmp_path / "made", tmp_path / "known", tmp_path / "page.html"
    tone(made, "a.wav", 500, rate=48_000)
    tone(known, "b.wav", 500, rate=48_000)
    words = ["novelty", str(made), str(known), "-f", "-o", str(out), "--clap"]
    result = CliRunner().invoke(cli.app, [*words, "musicldm"])
    assert result.exit_code == 0, result.output
    assert "musicldm" in out.read_text()
    result = CliRunner().invoke(cli.app, [*words, "audiosr-basic"])
    assert result.exit_code == 1
    assert "has no CLAP" in result.output
