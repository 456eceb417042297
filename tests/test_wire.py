"""Bit packing and the ``.scodec`` container."""

import io
import itertools
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semanticodec import config, wire
from semanticodec.errors import CodesError, CorruptedError, TruncatedError, VersionError, WireError
from semanticodec.wire import Gap, Header, Reader, Writer, container, pack, packed_size, read_codes, unpack, write_codes

BITS = (12, 13)


def make_codes(frames: int, rows: int = 1, bits: tuple[int, ...] = BITS, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, 1 << width, (rows, frames)) for width in bits], axis=1)


def make_header(frames: int, rows: int = 1, samples: int | None = -1, **changes: object) -> Header:
    values = {
        "preset": "mini-100",
        "weights": "0123abcd",
        "token_rate": 100,
        "sample_rate": 16000,
        "channels": rows,
        "code_bits": BITS,
        "samples": frames * 320 if samples == -1 else samples,
    }
    return Header(**(values | changes))


def make_file(frames: int, rows: int = 1, segment_frames: int = 8, seed: int = 0, **changes: object) -> bytes:
    file = io.BytesIO()
    write_codes(file, make_header(frames, rows, **changes), make_codes(frames, rows, seed=seed), segment_frames)
    return file.getvalue()


def spans(data: bytes) -> list[tuple[int, int]]:
    """Byte ranges of the segments of an undamaged file."""
    entries = Reader(io.BytesIO(data)).index
    ends = [*(entry.offset for entry in entries[1:]), data.rindex(wire.TAIL_SYNC)]
    return [(entry.offset, end) for entry, end in zip(entries, ends, strict=True)]


class OneWay(io.RawIOBase):
    """A pipe: bytes come in small pieces and cannot be seeked."""

    def __init__(self, data: bytes = b"") -> None:
        self.file = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        piece = self.file.read(min(len(buffer), 7))
        buffer[: len(piece)] = piece
        return len(piece)

    def write(self, data: bytes) -> int:
        return self.file.write(data)


class TestPack:
    @given(
        bits=st.lists(st.integers(1, 24), min_size=1, max_size=3),
        frames=st.integers(0, 70),
        rows=st.integers(1, 3),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_unpack_undoes_pack(self, bits: list[int], frames: int, rows: int, seed: int) -> None:
        codes = make_codes(frames, rows, tuple(bits), seed)
        data = pack(codes, bits)
        assert len(data) == packed_size(frames, bits, rows) == -(-rows * frames * sum(bits) // 8)
        back = unpack(data, bits, frames, rows)
        assert back.dtype == np.int64
        np.testing.assert_array_equal(back, codes)

    @given(width=st.integers(1, 24), values=st.lists(st.integers(0, 2**24 - 1), max_size=40))
    def test_matches_a_bit_string(self, width: int, values: list[int]) -> None:
        values = [value % (1 << width) for value in values]
        text = "".join(f"{value:0{width}b}" for value in values)
        text += "0" * (-len(text) % 8)
        want = bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
        assert pack(np.array([[values]], np.int64), (width,)) == want

    def test_streams_follow_each_other_row_by_row(self) -> None:
        codes = np.array([[[0xF, 0xF], [0, 0]], [[1, 2], [3, 4]]])
        assert pack(codes, (4, 4)) == b"\xff\x00\x12\x34"

    @pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.uint64])
    def test_any_integer_type(self, dtype: type) -> None:
        codes = make_codes(9)
        assert pack(codes.astype(dtype), BITS) == pack(codes, BITS)

    @pytest.mark.parametrize(
        ("codes", "bits", "match"),
        [
            (np.array([[[1 << 12], [0]]]), BITS, "stream 0"),
            (np.array([[[0], [-1]]]), BITS, "stream 1"),
            (np.zeros((1, 2, 3)), BITS, "float64"),
            (np.zeros((2, 3), int), BITS, "wanted integers"),
            (np.zeros((1, 3, 3), int), BITS, "wanted integers"),
            (np.zeros((1, 2, 3), int), (12, 25), "1 to 24"),
            (np.zeros((1, 2, 3), int), (0, 12), "1 to 24"),
        ],
    )
    def test_refuses_what_does_not_fit(self, codes: np.ndarray, bits: tuple[int, int], match: str) -> None:
        with pytest.raises(CodesError, match=match):
            pack(codes, bits)

    def test_unpack_wants_the_exact_size_and_zeros_at_the_end(self) -> None:
        data = pack(make_codes(3), BITS)
        for wrong in (data[:-1], data + b"\0"):
            with pytest.raises(CorruptedError, match="10 bytes"):
                unpack(wrong, BITS, 3)
        with pytest.raises(CorruptedError, match="not zero"):
            unpack(data[:-1] + bytes([data[-1] | 1]), BITS, 3)


class TestHeader:
    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"preset": ""}, "preset"),
            ({"preset": "x" * 129}, "preset"),
            ({"weights": "0123ABCD"}, "weights"),
            ({"weights": "0123"}, "weights"),
            ({"channels": 0}, "channels"),
            ({"channels": 65}, "channels"),
            ({"token_rate": 0}, "token_rate"),
            ({"sample_rate": 1 << 21}, "sample_rate"),
            ({"sample_rate": 16000.0}, "sample_rate"),
            ({"code_bits": (12,)}, "code_bits"),
            ({"code_bits": (12, 25)}, "code_bits"),
            ({"samples": -2}, "samples"),
            ({"samples": True}, "samples"),
        ],
    )
    def test_refuses_values_out_of_range(self, changes: dict[str, object], match: str) -> None:
        with pytest.raises(WireError, match=match):
            make_header(4, **changes)

    def test_every_preset_has_a_number(self) -> None:
        assert list(wire.PRESET_NUMBERS) == list(config.PRESETS)

    @given(
        preset=st.sampled_from(wire.PRESET_NUMBERS) | st.text(min_size=1, max_size=32),
        weights=st.integers(0, 2**32 - 1),
        token_rate=st.integers(1, 1 << 20),
        sample_rate=st.integers(1, 1 << 20),
        channels=st.integers(1, 64),
        bits=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    )
    def test_every_header_comes_back(
        self, preset: str, weights: int, token_rate: int, sample_rate: int, channels: int, bits: tuple[int, int]
    ) -> None:
        header = Header(preset, f"{weights:08x}", token_rate, sample_rate, channels, bits, samples=0)
        file = io.BytesIO()
        write_codes(file, header, np.empty((channels, 2, 0), int), 1)
        assert read_codes(file.getvalue()).header == header


class TestFile:
    @given(
        frames=st.integers(0, 60),
        rows=st.integers(1, 3),
        segment_frames=st.integers(1, 25),
        cuts=st.lists(st.integers(0, 60), max_size=4),
        known=st.booleans(),
    )
    def test_comes_back_however_it_is_cut(
        self, frames: int, rows: int, segment_frames: int, cuts: list[int], known: bool
    ) -> None:
        codes = make_codes(frames, rows)
        header = make_header(frames, rows, samples=frames * 320 if known else None)
        whole = io.BytesIO()
        edges = [0, *sorted(min(cut, frames) for cut in cuts), frames]
        writer = Writer(whole, header, segment_frames)
        for begin, end in itertools.pairwise(edges):
            writer.write(codes[..., begin:end])
        writer.close(frames * 320)
        got = read_codes(whole.getvalue())
        assert (got.header, got.samples, got.gaps) == (header, frames * 320, ())
        np.testing.assert_array_equal(got.codes, codes)
        segments = list(Reader(io.BytesIO(whole.getvalue())))
        assert [s.start for s in segments] == list(range(0, frames, segment_frames))

    @pytest.mark.parametrize("name", sorted(config.PRESETS))
    @pytest.mark.parametrize("sample_rate", [8000, 16000, 44100, 96000])
    @pytest.mark.parametrize("known", [True, False])
    def test_ten_seconds_cost_little_more_than_their_codes(self, name: str, sample_rate: int, known: bool) -> None:
        preset = config.preset(name)
        frames = preset.frames(160_000)
        header = Header(
            name, "89abcdef", preset.token_rate, sample_rate, 1, preset.code_bits, sample_rate * 10 if known else None
        )
        file = io.BytesIO()
        writer = Writer(file, header)
        writer.write(make_codes(frames, bits=preset.code_bits))
        writer.close(sample_rate * 10)
        size = len(file.getvalue())
        assert size - packed_size(frames, preset.code_bits) <= 51
        if preset.token_rate == 25:
            assert size < 500

    def test_the_bytes_are_those_of_the_docstring(self) -> None:
        codes = np.array([[[1, 2], [3, 4]]])
        file = io.BytesIO()
        write_codes(file, make_header(2, samples=640), codes)
        payload = bytes.fromhex("00100200180100")
        place = b"\x00\x02"
        check = zlib.crc32(place + payload).to_bytes(4, "big")
        want = b"SCD\x01\x11" + bytes.fromhex("98 00 ce0123abcd 64 cd3e80 01 0c 0d cd0280")
        assert file.getvalue().startswith(want)
        rest = file.getvalue()[len(want) + 2 :]
        assert rest.startswith(b"\xf5\x5a" + place + check + payload)
        tail = rest[8 + len(payload) :]
        assert tail[:-3] == b"\xf5\xa5\x05" + bytes.fromhex("92 c0 92 01 02")
        assert tail[-1] == len(tail) == 5 + 6

    def test_segments_are_about_ten_seconds(self) -> None:
        for rate, frames in ((100, 512), (50, 256), (25, 128)):
            assert make_header(1, token_rate=rate).segment_frames == frames

    def test_writes_and_reads_through_a_pipe(self) -> None:
        codes = make_codes(100, 2)
        pipe = OneWay()
        writer = Writer(pipe, make_header(100, 2, samples=None), 8)
        writer.write(codes)
        writer.close(samples=31_999)
        reader = Reader(OneWay(pipe.file.getvalue()))
        assert reader.samples is None
        np.testing.assert_array_equal(np.concatenate([s.codes for s in reader], axis=2), codes)
        assert reader.samples == 31_999

    def test_a_segment_is_out_before_the_next_one_is_in(self) -> None:
        inlet, outlet = os.pipe()
        codes, got, first = make_codes(24), [], threading.Event()

        def read() -> None:
            with os.fdopen(inlet, "rb") as file:
                for segment in Reader(file):
                    got.append(segment.codes)
                    first.set()

        thread = threading.Thread(target=read)
        thread.start()
        with os.fdopen(outlet, "wb") as file:
            writer = Writer(file, make_header(24), 8)
            writer.write(codes[..., :9])
            file.flush()
            assert first.wait(120)
            writer.write(codes[..., 9:])
            writer.close()
        thread.join(120)
        np.testing.assert_array_equal(np.concatenate(got, axis=2), codes)

    def test_an_exception_leaves_no_tail(self) -> None:
        file = io.BytesIO()

        def interrupted() -> None:
            with Writer(file, make_header(8), 4) as writer:
                writer.write(make_codes(8))
                raise RuntimeError

        with pytest.raises(RuntimeError):
            interrupted()
        with pytest.raises(TruncatedError, match="without its tail"):
            read_codes(file.getvalue())

    def test_writer_refuses(self) -> None:
        header = make_header(8, 2, samples=None)
        with pytest.raises(WireError, match="segment_frames"):
            Writer(io.BytesIO(), header, 0)
        with pytest.raises(WireError, match="over"):
            Writer(io.BytesIO(), make_header(8, 64), 1 << 16)
        writer = Writer(io.BytesIO(), header, 4)
        for codes in (make_codes(8, 1), make_codes(8, 2)[0], make_codes(8, 2).astype(float)):
            with pytest.raises(CodesError):
                writer.write(codes)
        writer.write(make_codes(8, 2))
        with pytest.raises(WireError, match="must say it"):
            writer.close()
        with pytest.raises(WireError, match="cannot stand for"):
            writer.close(16000)
        writer.close(2560)
        with pytest.raises(WireError, match="closed"):
            writer.write(make_codes(8, 2))
        with pytest.raises(WireError, match="contradicts"):
            Writer(io.BytesIO(), make_header(8), 4).close(samples=1)

    def test_needs_no_torch(self) -> None:
        code = "import semanticodec.wire, sys; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestSeek:
    def test_reads_from_any_frame_without_the_rest(self) -> None:
        codes = make_codes(2000)
        file = io.BytesIO()
        write_codes(file, make_header(2000), codes, 64)
        for frame in (0, 63, 64, 1000, 1999):
            # What lies before and behind is unreadable: seeking must not look at it.
            data = bytearray(file.getvalue())
            begin, end = spans(bytes(data))[frame // 64]
            tail = data.rindex(wire.TAIL_SYNC)
            first = spans(bytes(data))[0][0]
            data[first:begin] = bytes(begin - first)
            data[end:tail] = bytes(tail - end)
            reader = Reader(io.BytesIO(bytes(data)))
            reader.seek(frame)
            segment = next(iter(reader))
            assert segment.start == frame // 64 * 64
            np.testing.assert_array_equal(segment.codes, codes[..., segment.start : segment.stop])

    def test_the_index_does_not_disturb_reading(self) -> None:
        reader = Reader(io.BytesIO(make_file(30)))
        got = []
        for segment in reader:
            got.append(segment.start)
            assert len(reader.index) == 4
        assert got == [0, 8, 16, 24]

    def test_refusals(self) -> None:
        data = make_file(30)
        for frame in (-1, 30):
            with pytest.raises(WireError, match="no frame"):
                Reader(io.BytesIO(data)).seek(frame)
        with pytest.raises(TruncatedError, match="tail"):
            Reader(io.BytesIO(data[:-1])).seek(0)
        with pytest.raises(WireError, match="cannot be seeked"):
            Reader(OneWay(data)).seek(0)
        begin, end = spans(data)[1]
        with pytest.raises(CorruptedError, match="the index"):
            Reader(io.BytesIO(data[:begin] + data[end:])).seek(0)


class TestDamage:
    def test_every_truncation_is_named(self) -> None:
        data = make_file(20, 2)
        whole = make_codes(20, 2)
        for size in range(len(data)):
            with pytest.raises(TruncatedError, match=r"bytes|ends"):
                read_codes(data[:size])
            with pytest.raises(TruncatedError):
                read_codes(OneWay(data[:size]))
            try:
                got = read_codes(data[:size], salvage=True)
            except TruncatedError:
                assert size < spans(data)[0][0]
                continue
            good = sum(end <= size for _, end in spans(data))
            assert got.codes.shape[2] == (0, 8, 16, 20)[good]
            np.testing.assert_array_equal(got.codes, whole[..., : got.codes.shape[2]])
            assert got.gaps[0].start == got.codes.shape[2]
            assert got.gaps[0].stop == (20 if good < 3 else None)

    def test_every_single_bit_flip_is_caught_and_the_rest_survives(self) -> None:
        data, whole = make_file(20), make_codes(20)
        parts = spans(data)
        for bit in range(len(data) * 8):
            broken = bytearray(data)
            broken[bit // 8] ^= 1 << bit % 8
            with pytest.raises(WireError):
                read_codes(bytes(broken))
            got = read_codes(bytes(broken), salvage=True)
            assert got.gaps
            hit = [i for i, (begin, end) in enumerate(parts) if begin <= bit // 8 < end]
            want = whole.copy()
            for i in hit:
                want[..., i * 8 : i * 8 + 8] = -1
            if hit == [2]:
                want = want[..., :16]
            np.testing.assert_array_equal(got.codes, want, err_msg=f"bit {bit}")
            if hit:
                assert (got.gaps[0].start, got.gaps[0].stop) == (hit[0] * 8, min(hit[0] * 8 + 8, 20))

    @pytest.mark.parametrize("seed", range(4))
    def test_many_flips_never_do_worse_than_a_wire_error(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        data, whole = make_file(60, 2), make_codes(60, 2)
        begun = time.process_time()
        for _ in range(1500):
            broken = np.frombuffer(data, np.uint8).copy()
            places = rng.integers(0, len(data) * 8, rng.integers(1, 12))
            np.bitwise_xor.at(broken, places // 8, (1 << places % 8).astype(np.uint8))
            if rng.random() < 0.3:
                broken = np.delete(broken, slice(*np.sort(rng.integers(0, len(data), 2))))
            if broken.tobytes() == data:
                continue
            with pytest.raises(WireError):
                read_codes(broken.tobytes())
            try:
                got = read_codes(broken.tobytes(), salvage=True)
            except WireError:
                continue
            kept = got.codes >= 0
            np.testing.assert_array_equal(got.codes[kept], whole[..., : got.codes.shape[2]][kept])
        assert time.process_time() - begun < 120

    @settings(max_examples=300)
    @given(st.binary(max_size=300), st.booleans(), st.booleans())
    def test_noise_never_does_worse_than_a_wire_error(self, noise: bytes, headed: bool, salvage: bool) -> None:
        data = make_file(8)[: spans(make_file(8))[0][0]] + noise if headed else noise
        try:
            got = read_codes(data, salvage=salvage)
        except WireError:
            return
        assert got.codes.shape[2] == 0 or got.codes.max() >= 0

    def test_a_lost_segment_is_a_gap_in_place(self) -> None:
        data = make_file(40)
        begin, end = spans(data)[2]
        with pytest.raises(CorruptedError, match="goes on at frame 24; wanted frame 16"):
            read_codes(data[:begin] + data[end:])
        got = read_codes(data[:begin] + data[end:], salvage=True)
        assert got.gaps == (Gap(16, 24, "frames are missing"),)
        assert (got.codes[..., 16:24] == -1).all()
        assert got.samples == 40 * 320

    def test_segments_out_of_order_are_not_believed(self) -> None:
        data = make_file(40)
        begin, end = spans(data)[1]
        doubled = data[:end] + data[begin:end] + data[end:]
        with pytest.raises(CorruptedError, match="goes on at frame 8"):
            read_codes(doubled)
        got = read_codes(doubled, salvage=True)
        np.testing.assert_array_equal(got.codes, make_codes(40))
        assert [(gap.start, gap.stop) for gap in got.gaps] == [(16, 16)]

    def test_a_damaged_head_is_replaced_by_its_copy(self) -> None:
        data = bytearray(make_file(40))
        data[8] ^= 1
        with pytest.raises(CorruptedError, match="CRC"):
            read_codes(bytes(data))
        got = read_codes(bytes(data), salvage=True)
        np.testing.assert_array_equal(got.codes, make_codes(40))
        assert got.header == make_header(40)
        with pytest.raises(CorruptedError, match="CRC"):
            read_codes(OneWay(bytes(data)), salvage=True)

    def test_salvages_a_pipe(self) -> None:
        data = bytearray(make_file(400, segment_frames=50))
        data[spans(bytes(data))[3][0] + 3] = 0xFF
        got = read_codes(OneWay(bytes(data)), salvage=True)
        assert [(gap.start, gap.stop) for gap in got.gaps] == [(150, 200)]
        assert "frames" in got.gaps[0].reason or "CRC" in got.gaps[0].reason

    def test_a_sync_is_found_wherever_reads_end(self) -> None:
        data, whole = make_file(20), make_codes(20)
        begin = spans(data)[0][0]
        for junk in range(1, 15):
            got = read_codes(OneWay(data[:begin] + bytes(junk) + data[begin:]), salvage=True)
            np.testing.assert_array_equal(got.codes, whole)
            assert [(gap.start, gap.stop) for gap in got.gaps] == [(0, 0)]

    def test_a_lost_tail_loses_no_codes(self) -> None:
        data = make_file(40)
        cut = data[: data.rindex(wire.TAIL_SYNC)]
        got = read_codes(cut, salvage=True)
        np.testing.assert_array_equal(got.codes, make_codes(40))
        assert got.samples == 40 * 320
        assert len(got.gaps) == 1
        assert got.gaps[0].stop is None


class TestForeign:
    @pytest.mark.parametrize("salvage", [False, True])
    def test_other_files_are_named(self, salvage: bool) -> None:
        with pytest.raises(WireError, match="RIFF") as caught:
            read_codes(b"RIFF\x24\x00\x00\x00WAVEfmt ", salvage=salvage)
        assert type(caught.value) is WireError
        with pytest.raises(TruncatedError, match="0 bytes"):
            read_codes(b"", salvage=salvage)

    @pytest.mark.parametrize("salvage", [False, True])
    def test_newer_versions_are_named(self, salvage: bool) -> None:
        data = make_file(4)
        with pytest.raises(VersionError, match="version 3; this package knows 1 to 2"):
            read_codes(data[:3] + b"\x03" + data[4:], salvage=salvage)

    def test_newer_presets_are_named(self) -> None:
        with pytest.raises(VersionError, match="preset number 99"):
            read_codes(head_of([99, 1, 100, 16000, 1, 12, 13, 0]))

    @pytest.mark.parametrize(
        "fields",
        [
            [],
            [0, 1, 100, 16000, 1, 12, 13],
            [0, 1, 100, 16000, 1, 12, 13, 0, 0],
            [0, -1, 100, 16000, 1, 12, 13, 0],
            [0, 1, 100, 16000, 1 << 40, 12, 13, 0],
            [0, 1, 100, 16000, 1, 99, 13, 0],
            [0, 1, 100, 16000, 1, 12, 13, 1 << 60],
            [0, 1, 100, 16000, 1, 12, 13, 0.5],
            [True, 1, 100, 16000, 1, 12, 13, 0],
            [b"mini", 1, 100, 16000, 1, 12, 13, 0],
            [["mini"], 1, 100, 16000, 1, {}, 13, 0],
            {"preset": 0},
        ],
    )
    def test_senseless_heads_are_refused(self, fields: object) -> None:
        with pytest.raises(CorruptedError, match="head"):
            read_codes(head_of(fields))

    @pytest.mark.parametrize("body", [b"", b"\xc1", b"\xa1\xff", b"\xdd\xff\xff\xff\xff", b"\x98", b"\x91" * 200])
    def test_heads_that_are_not_msgpack_are_refused(self, body: bytes) -> None:
        with pytest.raises(CorruptedError, match="head"):
            read_codes(container.seal(b"SCD\x01" + bytes([len(body)]) + body))

    @pytest.mark.parametrize(
        "fields", [[], [None], [None, 3], [None, [1]], [None, [0, 1]], [None, [-1, 1]], [None, [1, 1], 3], [{}, []]]
    )
    def test_senseless_tails_are_refused(self, fields: object) -> None:
        data = head_of([0, 1, 100, 16000, 1, 12, 13, 0]) + tail_of(fields)
        with pytest.raises(CorruptedError, match="tail"):
            read_codes(data)
        with pytest.raises(CorruptedError, match="tail"):
            _ = Reader(io.BytesIO(data)).index

    def test_claimed_samples_must_fit_the_frames(self) -> None:
        data = head_of([0, 1, 100, 16000, 1, 12, 13, 1 << 40]) + tail_of([None, []])
        with pytest.raises(CorruptedError, match="samples are claimed"):
            read_codes(data)
        assert read_codes(data, salvage=True).samples == 0

    def test_bytes_after_the_tail_are_refused(self) -> None:
        with pytest.raises(CorruptedError, match="after the tail"):
            read_codes(make_file(8) + b"\0")
        assert read_codes(make_file(8) + b"\0", salvage=True).gaps == ()


class TestBounds:
    """Hostile lengths cost neither memory nor time."""

    @pytest.fixture(autouse=True)
    def small_footprint(self) -> object:
        read_codes(make_file(8))
        tracemalloc.start()
        begun = time.process_time()
        yield
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 48 << 20
        assert time.process_time() - begun < 60

    @pytest.mark.parametrize("salvage", [False, True])
    @pytest.mark.parametrize("frames", [1 << 16, (1 << 42) - 1, 0])
    def test_a_segment_of_many_frames(self, frames: int, salvage: bool) -> None:
        head = head_of([0, 1, 100, 16000, 1, 24, 24, 0])
        data = head + wire.SEGMENT_SYNC + container.varint(0) + container.varint(frames) + bytes(60)
        if salvage:
            assert read_codes(data, salvage=True).codes.shape[2] == 0
        else:
            with pytest.raises(WireError):
                read_codes(io.BufferedReader(OneWay(data)))

    def test_an_endless_length(self) -> None:
        head = head_of([0, 1, 100, 16000, 1, 12, 13, 0])
        with pytest.raises(CorruptedError, match="more than 6 bytes"):
            read_codes(head + wire.SEGMENT_SYNC + b"\xff" * 100)

    def test_a_segment_that_begins_in_a_million_years(self) -> None:
        head = head_of([0, 1, 100, 16000, 64, 12, 13, 0])
        data = head + segment_at(1 << 40, 1, 64)
        with pytest.raises(CorruptedError, match="goes on at frame"):
            read_codes(data)
        assert read_codes(data, salvage=True).codes.shape[2] == 0

    def test_many_leaping_segments(self) -> None:
        head = head_of([0, 1, 100, 16000, 1, 12, 13, 0])
        data = head + b"".join(segment_at(60_000 * i, 1) for i in range(3000))
        assert read_codes(data, salvage=True).codes.shape[2] < wire.MAX_LOST_FRAMES + len(data)

    @pytest.mark.parametrize("runs", [[1 << 40, 1], [1, 1 << 40], [1 << 48, 1 << 48]])
    def test_an_index_of_many_segments(self, runs: list[int]) -> None:
        data = head_of([0, 1, 100, 16000, 1, 12, 13, 0]) + tail_of([None, runs])
        with pytest.raises(CorruptedError, match="index"):
            _ = Reader(io.BytesIO(data)).index
        assert read_codes(data, salvage=True).codes.shape[2] == 0

    def test_a_file_full_of_false_beginnings(self) -> None:
        false = wire.SEGMENT_SYNC + container.varint(0) + container.varint(60_000)
        data = head_of([0, 1, 100, 16000, 1, 12, 13, 0]) + false * 300_000
        got = read_codes(data, salvage=True)
        assert got.codes.shape[2] == 0
        assert len(got.gaps) == 1

    def test_a_long_recording_is_written_and_read_in_little_memory(self, tmp_path: Path) -> None:
        codes = make_codes(5_000, 2)
        with (tmp_path / "long.scodec").open("w+b") as file:
            with Writer(file, make_header(1_000_000, 2)) as writer:
                for _ in range(200):
                    writer.write(codes)
            file.seek(0)
            tracemalloc.reset_peak()
            reader = Reader(file)
            assert sum(segment.codes.shape[2] for segment in reader) == 1_000_000
            reader.seek(777_777)
            assert next(iter(reader)).start == 777_777 // 512 * 512
            assert tracemalloc.get_traced_memory()[1] < 2 << 20


def head_of(fields: object) -> bytes:
    body = msgpack.packb(fields)
    return container.seal(b"SCD\x01" + bytes([len(body)]) + body)


def tail_of(fields: object) -> bytes:
    body = msgpack.packb(fields)
    tail = container.seal(wire.TAIL_SYNC + bytes([len(body)]) + body)
    return tail + bytes([len(tail) + 1])


def segment_at(start: int, frames: int, rows: int = 1) -> bytes:
    place = container.varint(start) + container.varint(frames)
    payload = bytes(packed_size(frames, BITS, rows))
    return wire.SEGMENT_SYNC + place + zlib.crc32(place + payload).to_bytes(4, "big") + payload
