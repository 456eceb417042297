"""The prior of codes, range coding by it, and ``.scodec`` files that hold what it makes."""

import contextlib
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semanticodec import config, wire
from semanticodec.errors import CodesError, CorruptedError, VersionError, WireError
from semanticodec.wire import Header, Reader, Writer, container, entropy, packed_size, prior, read_codes, write_codes

BITS = (4, 5)
BANDS = 4


def tensors(
    seed: int = 0, bands: int = BANDS, bits: tuple[int, int] = BITS, full: bool = False
) -> dict[str, np.ndarray]:
    """A random prior; ``full`` uses the largest integers there are."""
    rng = np.random.default_rng(seed)
    width, hidden, output = (24, 128, 40) if full else (4, 8, 6)

    def draw(*shape: int, scale: int = 127) -> np.ndarray:
        values = rng.integers(-scale, scale + 1, shape)
        return np.where(values < 0, -scale, scale) if full else values

    made = {}
    for q, (size, slots) in enumerate(zip((1 << bits[0], 1 << bits[1]), prior.SLOTS, strict=True)):
        made |= {
            f"{q}.embedding": draw(size + 1, width),
            f"{q}.first": draw(len(slots) * width, hidden),
            f"{q}.first_bias": draw(bands, hidden, scale=1000),
            f"{q}.second": draw(hidden, output),
            f"{q}.second_bias": draw(bands, output, scale=1000),
            f"{q}.output": draw(size, output, scale=20),
            f"{q}.bias": draw(bands, size, scale=60),
        }
    return made


PRIOR = prior.parse(tensors())


def likely(frames: int, rows: int = 1, seed: int = 0, which: prior.Prior = PRIOR) -> np.ndarray:
    """Codes that the prior expects: what random bytes decode to."""
    rng = np.random.default_rng(seed)
    return entropy.decode(which, rng.bytes(8 * rows * frames), frames, rows)


def make_codes(frames: int, rows: int = 1, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, 1 << width, (rows, frames)) for width in BITS], 1)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Ship the little prior as that of mini-50, and return its identity."""
    monkeypatch.setattr(prior, "FOLDER", tmp_path)
    prior.save(tensors(), "mini-50", "0123abcd", tmp_path)
    prior.load.cache_clear()
    yield PRIOR.id
    prior.load.cache_clear()


def make_header(id: int | None, frames: int, rows: int = 1, samples: int | None = -1) -> Header:
    known = frames * 640 if samples == -1 else samples
    return Header("mini-50", "0123abcd", 50, 16000, rows, BITS, known, id)


def make_file(id: int, codes: np.ndarray, segment_frames: int = 8) -> bytes:
    file = io.BytesIO()
    write_codes(file, make_header(id, codes.shape[2], len(codes)), codes, segment_frames)
    return file.getvalue()


class TestCoder:
    @settings(deadline=None, max_examples=60)
    @given(
        frames=st.integers(1, 40), rows=st.integers(1, 3), first=st.integers(0, 9), seed=st.integers(0, 99),
        surprising=st.booleans(),
    )  # fmt: skip
    def test_decode_undoes_encode(self, frames: int, rows: int, first: int, seed: int, surprising: bool) -> None:
        codes = make_codes(frames, rows, seed) if surprising else likely(frames, rows, seed)
        data = entropy.encode(PRIOR, codes, first)
        back = entropy.decode(PRIOR, data, frames, rows, first)
        assert back.dtype == np.int64
        np.testing.assert_array_equal(back, codes)
        np.testing.assert_array_equal(entropy.decode(PRIOR, data + bytes(7), frames, rows, first), codes)

    @settings(deadline=None, max_examples=40)
    @given(frames=st.integers(1, 40), seed=st.integers(0, 999))
    def test_no_byte_could_be_left_out(self, frames: int, seed: int) -> None:
        codes = likely(frames, seed=seed)
        data = entropy.encode(PRIOR, codes)
        assert not data.endswith(b"\0")
        if data:
            shorter = int.from_bytes(data[:-1], "big")
            for value in (shorter, shorter + 1):
                if value < 1 << 8 * (len(data) - 1):
                    again = value.to_bytes(len(data) - 1, "big")
                    assert not np.array_equal(entropy.decode(PRIOR, again, frames), codes)

    def test_much_is_coded_too(self) -> None:
        """As much as one call may take, from many channels."""
        codes = make_codes(entropy.MAX_CODED_FRAMES // 64, 64)
        assert np.array_equal(entropy.decode(PRIOR, entropy.encode(PRIOR, codes), codes.shape[2], 64), codes)

    def test_size_is_what_the_frequencies_say(self) -> None:
        codes = likely(200)
        grids = PRIOR.grid(1, 50)
        bits = 0.0
        for q in prior.STREAMS:
            grids[q][0, prior.MARGIN :, prior.MARGIN : -prior.MARGIN] = codes[0, q].reshape(-1, BANDS)
        for step in range(50):
            for band in range(BANDS):
                for q in prior.STREAMS:
                    table = PRIOR.frequencies(q, grids, np.array([0]), step, np.array([band]))[0]
                    bits -= math.log2(table[codes[0, q, step * BANDS + band]] / table.sum())
        assert 8 * len(entropy.encode(PRIOR, codes)) == pytest.approx(bits, abs=16)
        assert bits < 0.9 * 200 * sum(BITS)

    def test_nothing_later_is_looked_at(self) -> None:
        grids = [grid.copy() for grid in PRIOR.grid(1, 6)]
        rng = np.random.default_rng(0)
        for q, grid in enumerate(grids):
            grid[:] = rng.integers(0, PRIOR.sizes[q], grid.shape)
        order = [(step, q, band) for step in range(6) for q in prior.STREAMS for band in range(BANDS)]
        at = np.array([0])
        for index in (20, 31, 40):
            step, q, band = order[index]
            before = PRIOR.frequencies(q, (grids[0], grids[1]), at, step, np.array([band]))
            changed = [grid.copy() for grid in grids]
            for later, stream, place in order[index:]:
                changed[stream][0, later + prior.MARGIN, place + prior.MARGIN] = 0
            np.testing.assert_array_equal(
                before, PRIOR.frequencies(q, (changed[0], changed[1]), at, step, np.array([band]))
            )

    def test_the_largest_integers_are_exact(self) -> None:
        """The promise of float32 products: compare with 64-bit integers at the ends of the ranges."""
        made = tensors(full=True)
        large = prior.parse(made)
        grids = large.grid(1, 2)
        rng = np.random.default_rng(1)
        for q, grid in enumerate(grids):
            grid[:] = rng.integers(0, large.sizes[q], grid.shape)
        for q in prior.STREAMS:
            for band in range(BANDS):
                got = large.frequencies(q, grids, np.array([0]), 1, np.array([band]))[0]
                np.testing.assert_array_equal(got, by_integers(made, q, grids, band))

    def test_rows_do_not_know_each_other(self) -> None:
        codes = likely(24, 2)
        alone = sum(len(entropy.encode(PRIOR, row[None])) for row in codes)
        assert abs(len(entropy.encode(PRIOR, codes)) - alone) <= 2

    @settings(deadline=None, max_examples=100)
    @given(data=st.binary(max_size=60), frames=st.integers(1, 30), first=st.integers(0, 5))
    def test_any_bytes_decode_or_are_refused(self, data: bytes, frames: int, first: int) -> None:
        try:
            codes = entropy.decode(PRIOR, data, frames, 1, first)
        except CorruptedError:
            return
        assert codes.shape == (1, 2, frames)
        assert (codes >= 0).all()
        assert all((codes[:, q] < size).all() for q, size in enumerate(PRIOR.sizes))

    @pytest.mark.parametrize(
        ("codes", "match"),
        [
            (np.zeros((1, 2, 3)), "float64"),
            (np.zeros((2, 3), int), "wanted integers"),
            (np.zeros((1, 3, 3), int), "wanted integers"),
            (np.zeros((1, 2, 0), int), "rows x frames"),
            (np.zeros((2, 2, 4097), int), "rows x frames"),
            (np.full((1, 2, 3), -1), "stream 0"),
            (np.full((1, 2, 3), 16), "stream 0"),
            (np.array([[[0], [32]]]), "stream 1"),
        ],
    )
    def test_refuses_other_codes(self, codes: np.ndarray, match: str) -> None:
        with pytest.raises(CodesError, match=match):
            entropy.encode(PRIOR, codes)

    @pytest.mark.parametrize(("frames", "rows"), [(0, 1), (8193, 1), (4097, 2)])
    def test_refuses_to_decode_much_from_little(self, frames: int, rows: int) -> None:
        with pytest.raises(CorruptedError, match="allowed"):
            entropy.decode(PRIOR, b"", frames, rows)


def by_integers(made: dict[str, np.ndarray], q: int, grids: tuple[np.ndarray, np.ndarray], band: int) -> np.ndarray:
    """One table of frequencies at row 0, step 1, in 64-bit integers."""
    part = {name: made[f"{q}.{name}"].astype(np.int64) for name in prior.TENSORS}
    seen = np.concatenate(
        [
            made[f"{other}.embedding"].astype(np.int64)[
                grids[other][0, 1 + prior.MARGIN + dt, band + prior.MARGIN + db]
            ]
            for other, dt, db in prior.SLOTS[q]
        ]
    )
    x = np.clip((seen @ part["first"] + part["first_bias"][band]) >> 6, 0, 255)
    x = np.clip((x @ part["second"] + part["second_bias"][band]) >> 6, -127, 127)
    logits = x @ part["output"].T + (part["bias"][band] << 6)
    places = np.minimum((logits.max() - logits) >> 4, len(prior.POWERS) - 1)
    return prior.POWERS[places]


class TestPowers:
    def test_are_those_of_e(self) -> None:
        want = np.exp(-np.arange(len(prior.POWERS)) / 64) * 2**24
        np.testing.assert_allclose(prior.POWERS[:-1], want[:-1], rtol=1e-6, atol=0.51)
        assert prior.POWERS[0] == 1 << 24
        assert prior.POWERS[-1] == 0
        assert np.array_equal(np.rint(prior.POWERS), prior.POWERS)


class TestShipping:
    def test_save_load(self, shipped: int, tmp_path: Path) -> None:
        again = prior.current("mini-50")
        assert again.id == shipped == prior.load("mini-50", shipped).id
        codes = likely(9)
        assert entropy.encode(again, codes) == entropy.encode(PRIOR, codes)
        prior.save(tensors(1), "mini-50", "0123abcd", tmp_path)
        assert prior.current("mini-50").id == prior.parse(tensors(1)).id != shipped
        assert prior.load("mini-50", shipped).id == shipped  # the old one stays

    @pytest.mark.usefixtures("shipped")
    def test_none_for_other_presets(self) -> None:
        with pytest.raises(WireError, match=r"no prior for .*semanticodec-100-4096.*mini-50"):
            Header.of(config.preset("semanticodec-100-4096"), "0123abcd", 16000, 1, 0, entropy=True)

    @pytest.mark.parametrize("name", ["mini-50", "../mini-50", "/etc/passwd", "mini-*"])
    @pytest.mark.usefixtures("shipped")
    def test_unknown_ones_are_named(self, name: str) -> None:
        with pytest.raises(VersionError, match="prior 00000001"):
            prior.load(name, 1)

    def test_identity_is_that_of_every_number(self) -> None:
        for name, values in tensors().items():
            changed = tensors()
            changed[name] = values.copy()
            changed[name].flat[-1] ^= 1
            assert prior.parse(changed).id != PRIOR.id


class TestContainer:
    @settings(deadline=None, max_examples=30)
    @given(frames=st.integers(0, 70), rows=st.integers(1, 2), segment=st.integers(1, 20), surprising=st.booleans())
    def test_round_trip(self, frames: int, rows: int, segment: int, surprising: bool) -> None:
        codes = make_codes(frames, rows) if surprising or not frames else likely(frames, rows)
        with shipped_prior():
            data = make_file(PRIOR.id, codes, segment)
            recording = read_codes(data)
            np.testing.assert_array_equal(recording.codes, codes)
            assert recording.header == make_header(PRIOR.id, frames, rows)
            entries = Reader(io.BytesIO(data)).index
            assert [entry.start for entry in entries] == list(range(0, frames, segment))
            for entry in entries:
                reader = Reader(io.BytesIO(data))
                reader.seek(entry.start)
                assert next(iter(reader)).start == entry.start

    def test_saves_bits_and_never_costs_many(self, shipped: int) -> None:
        packed = io.BytesIO()
        write_codes(packed, make_header(None, 256), likely(256), 64)
        assert len(make_file(shipped, likely(256), 64)) < 0.9 * len(packed.getvalue())
        packed = io.BytesIO()
        write_codes(packed, make_header(None, 256), make_codes(256), 64)
        assert len(make_file(shipped, make_codes(256), 64)) <= len(packed.getvalue()) + 6 + 4 * 2

    def test_packed_files_stay_version_1(self, shipped: int) -> None:
        file = io.BytesIO()
        write_codes(file, make_header(None, 8), make_codes(8))
        assert file.getvalue()[3] == 1
        assert make_file(shipped, make_codes(8))[3] == 2
        head = bytearray(file.getvalue())
        size = 5 + head[4]
        head[3] = 2
        head[size : size + 2] = container.seal(bytes(head[:size]))[-2:]
        with pytest.raises(CorruptedError, match="8 fields; wanted 9"):
            read_codes(bytes(head))

    def test_unknown_prior_is_a_newer_version(self, shipped: int, tmp_path: Path) -> None:
        data = make_file(shipped, make_codes(8))
        for file in tmp_path.glob("*.npz"):
            file.unlink()
        prior.load.cache_clear()
        for salvage in (False, True):
            with pytest.raises(VersionError, match=f"{shipped:08x}"):
                read_codes(data, salvage=salvage)

    def test_prior_of_other_sizes(self, shipped: int) -> None:
        header = Header("mini-50", "0123abcd", 50, 16000, 1, (12, 13), 0, shipped)
        with pytest.raises(WireError, match="cannot follow"):
            Writer(io.BytesIO(), header)

    def test_long_segments_are_refused_and_usual_ones_fit(self, shipped: int) -> None:
        with pytest.raises(WireError, match="too long for entropy coding"):
            Writer(io.BytesIO(), make_header(shipped, 0), 8193)
        assert make_header(shipped, 0, 64).segment_frames == 128
        assert make_header(shipped, 0, 1).segment_frames == 256

    def test_any_damage_is_told(self, shipped: int) -> None:
        codes = likely(60, 1)
        data = make_file(shipped, codes)
        rng = np.random.default_rng(0)
        for _ in range(150):
            hurt = bytearray(data)
            for _ in range(int(rng.integers(1, 4))):
                hurt[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            if bytes(hurt) == data:
                continue
            with pytest.raises(WireError):
                read_codes(bytes(hurt))
            try:
                found = read_codes(bytes(hurt), salvage=True)
            except WireError:
                continue
            kept = found.codes >= 0
            np.testing.assert_array_equal(found.codes[kept], codes[..., : found.codes.shape[2]][kept])
        for size in range(len(data)):
            with pytest.raises(WireError):
                read_codes(data[:size])

    @pytest.mark.parametrize("octets", [0, 1, 8, 10_000])
    def test_false_sizes(self, shipped: int, octets: int) -> None:
        place = container.varint(0) + container.varint(64) + container.varint(octets)
        data = make_file(shipped, np.zeros((1, 2, 0), int))
        head = data[: data.index(wire.TAIL_SYNC)]
        segment = wire.SEGMENT_SYNC + place + bytes(4) + bytes(octets)
        assert not -(-packed_size(64, BITS) // container.MIN_CODED_SHARE) <= octets <= packed_size(64, BITS)
        with pytest.raises(CorruptedError, match="claims"):
            read_codes(head + segment)

    def test_little_data_cannot_mean_much_work(self, shipped: int) -> None:
        """However well the codes were expected, the bytes are at least an eighth of the packed ones."""
        data = make_file(shipped, np.zeros((1, 2, 4096), int), 4096)
        assert len(data) * container.MIN_CODED_SHARE >= packed_size(4096, BITS)

    def test_salvaging_decodes_no_byte_twice(self, shipped: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Segments one inside another, each with a good checksum and a payload that decodes to nothing."""
        decoded: list[int] = []

        def never(_: object, data: bytes, *__: object) -> np.ndarray:
            decoded.append(len(data))
            raise CorruptedError("these bytes stand for no codes")

        frames, size = 4096, packed_size(4096, BITS) // container.MIN_CODED_SHARE
        place = container.varint(0) + container.varint(frames) + container.varint(size)
        body = bytearray(20 * 16 + size)
        for at in reversed(range(0, 20 * 16, 16)):
            payload = body[at + 6 + len(place) :][:size]
            check = zlib.crc32(payload, zlib.crc32(place)).to_bytes(4, "big")
            body[at : at + 6 + len(place)] = wire.SEGMENT_SYNC + place + check
        whole = make_file(shipped, make_codes(16))
        begin = whole.index(wire.SEGMENT_SYNC)
        monkeypatch.setattr(entropy, "decode", never)
        reader = Reader(io.BytesIO(whole[:begin] + body + whole[begin:]), salvage=True)
        assert [segment.start for segment in reader] == [0, 8]
        assert 0 < sum(decoded) <= len(body)

    @settings(deadline=None, max_examples=60)
    @given(payload=st.binary(min_size=9, max_size=71))
    def test_hostile_payloads_under_a_good_checksum(self, payload: bytes) -> None:
        with shipped_prior():
            place = container.varint(0) + container.varint(64) + container.varint(len(payload))
            data = make_file(PRIOR.id, np.zeros((1, 2, 0), int))
            head = data[: data.index(wire.TAIL_SYNC)]
            check = zlib.crc32(payload, zlib.crc32(place)).to_bytes(4, "big")
            reader = Reader(io.BytesIO(head + wire.SEGMENT_SYNC + place + check + payload))
            with contextlib.suppress(CorruptedError):
                assert next(iter(reader)).codes.shape == (1, 2, 64)


@contextlib.contextmanager
def shipped_prior() -> Iterator[None]:
    """Ship the little prior inside a hypothesis test, which no function's fixture may enter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(container, "load", lambda *_: PRIOR)
        yield


SETTINGS = (
    {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Prescott"},
    {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "OPENBLAS_CORETYPE": "Haswell"},
)
"""Another number of threads, and another matrix kernel: other orders of addition."""
ENCODE = """
import sys, numpy as np
from semanticodec.wire import Header, write_codes, prior
rate, frames = int(sys.argv[1]), 96
made = prior.current(f"mini-{rate}")
rng = np.random.default_rng(0)
codes = np.stack([np.sort(rng.integers(0, size, (2, frames))) for size in made.sizes], 1)
with open(sys.argv[2], "wb") as file:
    write_codes(file, Header(f"mini-{rate}", "0123abcd", rate, 16000, 2, (12, 13), 0, made.id), codes, 40)
np.save(sys.argv[2] + ".npy", codes)
"""
DECODE = """
import sys, numpy as np
from semanticodec.wire import read_codes
with open(sys.argv[1], "rb") as file:
    assert np.array_equal(read_codes(file).codes, np.load(sys.argv[1] + ".npy")), "other codes"
"""


class TestShipped:
    @pytest.mark.parametrize("name", sorted(prior.presets()))
    def test_no_sum_leaves_what_float32_holds(self, name: str) -> None:
        for q, layers in enumerate(prior.current(name).streams):
            widths = [prior.current(name).streams[stream].embedding.shape[1] for stream, *_ in prior.SLOTS[q]]
            largest = [float(np.abs(prior.current(name).streams[s].embedding).max()) for s, *_ in prior.SLOTS[q]]
            seen = np.repeat(largest, widths)
            first = seen @ np.abs(layers.first) + np.abs(layers.first_bias).max(0)
            second = prior.HIDDEN_MAX * np.abs(layers.second).sum(0) + np.abs(layers.second_bias).max(0)
            last = prior.OUTPUT_MAX * np.abs(layers.output).sum(1) + 64 * np.abs(layers.bias).max(0)
            assert max(first.max(), second.max(), last.max()) < 2**24

    def test_every_mini_has_one_and_they_are_small(self) -> None:
        ids = json.loads((prior.FOLDER / "current.json").read_text())
        assert sorted(ids) == sorted(f"mini-{rate}" for rate in config.RATES)
        for name in ids:
            current = prior.current(name)
            assert current.sizes == config.preset(name).codebook_sizes
            assert current.bands == config.preset(name).group
        assert sum(file.stat().st_size for file in prior.FOLDER.iterdir()) <= 3_000_000

    @pytest.mark.parametrize("rate", config.RATES)
    def test_written_here_decodes_there(self, rate: int, tmp_path: Path) -> None:
        """A file written in one process and numeric setting decodes in another, and is the same to the byte."""
        files = []
        for index, (there, here) in enumerate((SETTINGS, SETTINGS[::-1])):
            files.append(tmp_path / f"{index}.scodec")
            for script, words, setting in (
                (ENCODE, [str(rate), str(files[-1])], there),
                (DECODE, [str(files[-1])], here),
            ):
                subprocess.run([sys.executable, "-c", script, *words], env={**os.environ, **setting}, check=True)
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "id", "size", "digest"),
    [
        ("mini-100", 0x7516F9F0, 700, "00634203c0ddc7b7"),
        ("mini-50", 0xFF87477C, 288, "610340bf34dbe151"),
        ("mini-25", 0xA163ABA6, 285, "c4f10f2ed48076e1"),
    ],
)
def test_what_was_written_once_is_read_for_ever(name: str, id: int, size: int, digest: str) -> None:
    """Bytes of the shipped priors, as they were first written: whatever the range coder's library becomes."""
    preset = config.PRESETS[name]
    which = prior.load(name, id)
    at = np.arange(20 * preset.group)
    sizes = zip((131, 977), preset.codebook_sizes, strict=True)
    codes = np.stack([(at * step + at**2 * 7) % values for step, values in sizes])[None]
    data = entropy.encode(which, codes)
    assert (len(data), hashlib.sha256(data).hexdigest()[:16]) == (size, digest)
    assert np.array_equal(entropy.decode(which, data, codes.shape[2]), codes)
