"""Streams over a broken link: each unit exactly once, or the gap is reported; nothing grows without bound."""

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semanticodec.config import PRESETS
from semanticodec.errors import CodesError, CorruptedError, WireError
from semanticodec.wire import entropy, link, messages, prior
from semanticodec.wire.blocks import (
    Block,
    Chunk,
    Geometry,
    Meter,
    agreed,
    choose_bundle,
    chunk_of,
    coding_features,
    frame_bytes,
    gross_rate,
    samples_of,
)
from semanticodec.wire.channel import Arrived, AudioOut, CodesOut, Inlet
from semanticodec.wire.link import Lost, Receiver, Sender, Unit
from semanticodec.wire.messages import Audio, Codes, Marker, Missing, decode, encode

MINI = Geometry(5120, (12, 13), (100, 50, 25))
BLOCK_NS = 320_000_000


def block(seq: int, rate: int = 100, copy: bool = True) -> Block:
    """A block that says which one it is."""
    data = seq.to_bytes(4, "big") + bytes(MINI.block_bytes(rate) - 4)
    return Block(data, rate, seq * 5120, seq.to_bytes(4, "big") + bytes(MINI.block_bytes(25) - 4) if copy else b"")


def number(item: Block) -> int:
    return int.from_bytes(item.data[:4], "big")


def codes_out(window: int = 64, *, first: int = 0, limit: int | None = None, **options: int) -> CodesOut:
    return CodesOut(MINI, 100, Sender(window, 1 << 20, first, limit), **options)


class TestGeometry:
    @pytest.mark.parametrize("name", list(PRESETS))
    def test_every_preset_can_be_sent(self, name: str):
        config = PRESETS[name]
        geometry = Geometry(config.block, config.code_bits, (config.token_rate,))
        assert geometry.frames(config.token_rate) == config.frames(config.block)
        codes = np.random.default_rng(0).integers(0, 4096, (2, geometry.frames(config.token_rate)))
        packed = geometry.pack(codes, config.token_rate)
        assert len(packed) == geometry.block_bytes(config.token_rate)
        assert (geometry.unpack(packed, config.token_rate) == codes).all()

    def test_a_block_of_mini_is_50_25_or_13_bytes(self):
        assert [MINI.block_bytes(rate) for rate in MINI.rates] == [50, 25, 13]
        assert MINI.block_ns == BLOCK_NS
        assert MINI.copy_rate == 25

    @pytest.mark.parametrize(
        ("block", "rates"), [(5121, (100,)), (5120, (100, 33)), (1 << 24, (10_000,)), (5120, (0,))]
    )
    def test_what_cannot_be_sent_is_refused(self, block: int, rates: tuple[int, ...]):
        with pytest.raises(WireError, match="cannot be sent"):
            Geometry(block, (12, 13), rates)

    def test_blocks_that_would_not_unpack_are_refused(self):
        good = bytes(12) + b"\xf0"
        assert MINI.split(good * 2, 25) == [good, good]
        for data, rate in [(good + b"\0", 25), (good, 30), (bytes(12) + b"\x01", 25), (b"", 25), (good * 33, 25)]:
            with pytest.raises(CorruptedError):
                MINI.split(data, rate)
        with pytest.raises(CodesError, match="wanted"):
            MINI.pack(np.zeros((2, 5), np.int64), 25)


class TestEntropy:
    """Codes that are coded in one message after both ends have agreed on priors."""

    PRESETS = ("mini-100", "mini-50", "mini-25")
    CODED = agreed(MINI, PRESETS, coding_features())

    def codes(self, rate: int, blocks: int, seed: int = 0) -> list[bytes]:
        """Blocks that the prior expects."""
        made = prior.current(f"mini-{rate}")
        frames = MINI.frames(rate)
        codes = entropy.decode(made, np.random.default_rng(seed).bytes(100 * blocks), blocks * frames)[0]
        return [MINI.pack(one, rate) for one in np.split(codes, blocks, 1)]

    def test_only_what_both_know_is_agreed(self):
        one = coding_features(["mini-50"])
        assert agreed(MINI, self.PRESETS, ("room",)) == MINI
        assert agreed(MINI, self.PRESETS, ("entropy-00000000",)) == MINI
        assert [made is not None for made in agreed(MINI, self.PRESETS, one).priors] == [False, True, False]
        assert coding_features(["semanticodec-100-4096"]) == ()

    @pytest.mark.parametrize("rate", MINI.rates)
    @pytest.mark.parametrize("count", [1, 4])
    def test_part_undoes_join(self, rate: int, count: int):
        blocks = self.codes(rate, count)
        data = self.CODED.join(blocks, rate)
        assert data[0] == count
        assert len(data) <= 1 + 0.95 * count * MINI.block_bytes(rate)
        assert self.CODED.part(data, rate) == blocks
        assert MINI.join(blocks, rate) == b"".join(blocks)
        for wrong in (data[:1], b"", bytes([33]) + data[1:], bytes([count]) + bytes(count * MINI.block_bytes(rate))):
            with pytest.raises(CorruptedError):
                self.CODED.part(wrong, rate)

    @pytest.mark.parametrize("rate", MINI.rates)
    @pytest.mark.parametrize("count", [1, 3])
    def test_blocks_are_counted_without_decoding(self, monkeypatch: pytest.MonkeyPatch, rate: int, count: int):
        monkeypatch.delattr(entropy, "decode")
        packed = [bytes(MINI.block_bytes(rate))] * count
        assert self.CODED.units(b"\0" + b"".join(packed), rate) == count
        assert self.CODED.units(self.CODED.join(packed, rate), rate) == count
        assert MINI.units(b"".join(packed), rate) == count
        for wrong in (b"", b"\0", b"\0" + bytes(count * MINI.block_bytes(rate) + 1), bytes([33]) + bytes(99), b"\1"):
            with pytest.raises(CorruptedError):
                self.CODED.units(wrong, rate)

    def test_what_has_come_is_not_decoded_again(self, monkeypatch: pytest.MonkeyPatch):
        inlet = Inlet("codes", self.CODED, 100, 16)
        message = Codes(0, self.CODED.join(self.codes(100, 2), 100))
        assert len(inlet.take(message)) == 2
        monkeypatch.delattr(entropy, "decode")
        assert inlet.take(message) == []

    def test_a_message_is_coded_once_for_all_listeners(self, monkeypatch: pytest.MonkeyPatch):
        blocks = self.codes(50, 2, seed=99)
        data = self.CODED.join(blocks, 50)
        monkeypatch.delattr(entropy, "encode")
        assert self.CODED.join(blocks, 50) == data

    @pytest.mark.parametrize("rate", MINI.rates)
    def test_a_bundle_keeps_to_its_bits_with_codes_that_nothing_was_expected_of(self, rate: int):
        block = MINI.pack(np.random.default_rng(0).integers(0, 4096, (2, MINI.frames(rate))), rate)
        message = Codes(1 << 16, self.CODED.join([block] * 2, rate), rate)
        bits = 8 * frame_bytes(len(messages.encode(message)), masked=True) * 16_000 / (2 * MINI.block)
        assert gross_rate(self.CODED, rate, 2, 0, masked=True) == bits

    @settings(deadline=None, max_examples=25)
    @given(seed=st.integers(0, 10**6), count=st.integers(1, 4), rate=st.sampled_from(MINI.rates))
    def test_any_blocks_come_back(self, seed: int, count: int, rate: int):
        rng = np.random.default_rng(seed)
        codes = np.stack([rng.integers(0, 1 << width, (count * MINI.frames(rate))) for width in MINI.code_bits])
        blocks = [MINI.pack(one, rate) for one in np.split(codes, count, 1)]
        data = self.CODED.join(blocks, rate)
        assert len(data) <= count * MINI.block_bytes(rate) + 1
        assert self.CODED.part(data, rate) == blocks

    @settings(deadline=None, max_examples=40)
    @given(data=st.binary(max_size=60), rate=st.sampled_from(MINI.rates))
    def test_anything_is_blocks_or_refused(self, data: bytes, rate: int):
        try:
            blocks = self.CODED.part(data, rate)
        except CorruptedError:
            return
        assert blocks
        assert {len(one) for one in blocks} == {MINI.block_bytes(rate)}

    def test_messages_stand_for_themselves(self):
        """What is sent through a channel is coded, and a lost message costs no other."""
        out = CodesOut(self.CODED, 100, Sender(64, 1 << 20), bundle=2)
        blocks = self.codes(100, 6)
        for seq, data in enumerate(blocks):
            out.push(Block(data, 100, seq * 5120), 0)
        messages = [decode(encode(out.pull(0))) for _ in range(3)]
        assert all(len(message.data) < 2 * MINI.block_bytes(100) for message in messages)
        inlet = Inlet("codes", self.CODED, 100, 64)
        heard = [*inlet.take(messages[0]), *inlet.take(messages[2])]
        found = {one.seq: one.item.data for one in heard if isinstance(one, Arrived)}
        assert found == {seq: blocks[seq] for seq in (0, 1, 4, 5)}


class TestBundling:
    def test_one_block_if_nothing_is_asked(self):
        assert choose_bundle(MINI, 100, latency=None, gross=None, copies=0, masked=False) == 1

    @pytest.mark.parametrize(("latency", "bundle"), [(0, 1), (319, 1), (320, 2), (639, 2), (640, 3), (10**7, 32)])
    def test_latency(self, latency: int, bundle: int):
        assert choose_bundle(MINI, 100, latency=latency, gross=None, copies=0, masked=False) == bundle

    @given(
        rate=st.sampled_from(MINI.rates),
        gross=st.integers(200, 3000),
        copies=st.integers(0, 8),
        masked=st.booleans(),
        latency=st.none() | st.integers(0, 20_000),
    )
    def test_gross(self, rate: int, gross: int, copies: int, masked: bool, latency: int | None):
        """The smallest bundle that keeps within the rate, as long as the latency allows."""
        n = choose_bundle(MINI, rate, latency=latency, gross=gross, copies=copies, masked=masked)
        most = 32 if latency is None else min(32, 1 + latency // 320)
        assert n <= most
        assert n == most or gross_rate(MINI, rate, n, copies, masked=masked) <= gross
        assert n == 1 or gross_rate(MINI, rate, n - 1, copies, masked=masked) > gross

    def test_gross_is_what_messages_take(self):
        out = codes_out(bundle=4, first=1 << 16)
        for seq in range(1 << 16, (1 << 16) + 4):
            out.push(block(seq, copy=False), 0)
        message = out.pull(0)
        assert isinstance(message, Codes)
        octets = frame_bytes(len(encode(message)), masked=True)
        # counted with a rate that says itself: 2 bytes
        assert gross_rate(MINI, 100, 4, 0, masked=True) == Fraction((octets + 2) * 8 * 16000, 4 * 5120)
        assert gross_rate(MINI, 100, 4, 0, masked=True) <= 1425

    @pytest.mark.parametrize(("size", "framed"), [(0, 2), (125, 127), (126, 130), (65535, 65539), (65536, 65546)])
    def test_frames(self, size: int, framed: int):
        assert frame_bytes(size, masked=False) == framed
        assert frame_bytes(size, masked=True) == framed + 4

    def test_meter(self):
        meter = Meter()
        assert meter.rate(5) == 0
        for i in range(100):
            meter.add(125, i * 100_000_000)
        assert meter.total == 12_500
        assert meter.rate(99 * 100_000_000) == pytest.approx(10_000, rel=0.05)
        assert meter.rate(60 * 10**9) == 0  # a jump ahead: nothing came lately
        meter.add(125, 0)  # a jump back: the clock stands still
        assert meter.rate(0) == pytest.approx(1000 / 4, rel=0.2)
        assert len(meter._buckets) <= 8


class TestSamples:
    def test_round_trip(self):
        pcm = np.array([-1, -0.5, 0, 0.25, 32767 / 32768], np.float32)
        assert (samples_of(chunk_of(pcm, "s16"), "s16") == pcm).all()
        assert (samples_of(chunk_of(pcm, "f32"), "f32") == pcm).all()
        assert chunk_of(np.array([1.5, -1.5], np.float32), "s16") == b"\xff\x7f\x00\x80"

    def test_nonsense_is_tamed(self):
        wild = np.array([np.nan, np.inf, -np.inf, 3], "<f4").tobytes()
        assert samples_of(wild, "f32").tolist() == [0, 1, -1, 1]
        with pytest.raises(WireError, match="multiple of 4"):
            samples_of(wild[:-1], "f32")


class TestSender:
    def test_acknowledged_units_are_forgotten(self):
        sender: Sender[str] = Sender(8, 1000)
        for name in "abcd":
            sender.push(name, 10, 0)
        assert [sender.take() for _ in range(3)] == [Unit(i, name, 10, 0) for i, name in enumerate("abc")]
        sender.ack(2)
        assert (sender.kept, sender.kept_bytes, sender.waiting, sender.cursor) == (2, 20, 1, 3)
        sender.rewind(2)
        assert [sender.take().seq for _ in range(2)] == [2, 3]

    def test_claims_about_what_was_never_sent_are_refused(self):
        sender: Sender[str] = Sender(8, 1000)
        sender.push("a", 1, 0)
        with pytest.raises(WireError, match="only those before 0"):
            sender.ack(1)
        with pytest.raises(WireError, match="only those before 1"):
            sender.rewind(2)

    def test_what_another_server_has_sent_is_skipped(self):
        sender: Sender[int] = Sender(8, 1000, first=20)
        for i in range(20, 26):
            sender.push(i, 1, 0)
        sender.rewind(23)
        assert (sender.cursor, sender.kept, sender.waiting, sender.lost) == (23, 3, 3, 0)
        assert sender.take().seq == 23

    def test_beyond_the_window_the_oldest_are_lost(self):
        sender: Sender[int] = Sender(4, 1000, overflow="window")
        for i in range(10):
            sender.push(i, 1, 0)
        assert sender.take() == Lost(0, 6, "window")
        assert sender.lost == 6
        assert [sender.take().seq for _ in range(4)] == [6, 7, 8, 9]
        sender.push(10, 1, 0)  # forgets 6, which was sent
        assert sender.lost == 6
        sender.rewind(5)
        assert sender.take() == Lost(5, 7, "window")
        assert [sender.take().seq for _ in range(4)] == [7, 8, 9, 10]

    def test_bytes_are_bounded_too(self):
        sender: Sender[int] = Sender(100, 50)
        for i in range(10):
            sender.push(i, 20, 0)
        assert sender.kept_bytes <= 50
        assert sender.take() == Lost(0, 8, "overload")
        sender.push(10, 500, 0)
        assert sender.kept == 1

    def test_nothing_was_lost_before_the_first_unit(self):
        sender: Sender[int] = Sender(8, 1000, first=500)
        sender.push(0, 1, 0)
        sender.rewind(0)
        assert sender.take().seq == 500
        assert sender.lost == 0

    def test_losses_are_announced_again_until_acknowledged(self):
        sender: Sender[int] = Sender(8, 1000)
        sender.lose(3, "source")
        sender.lose(0, "source")
        sender.push(3, 1, 0)
        assert sender.take() == Lost(0, 3, "source")
        sender.rewind(1)
        assert sender.take() == Lost(1, 3, "source")
        assert sender.take().seq == 3
        sender.rewind(4)
        assert sender.front() is None
        assert sender.lost == 3

    def test_dropped_to_live(self):
        sender: Sender[int] = Sender(64, 1000)
        for i in range(20):
            sender.push(i, 1, 0)
            if i == 10:
                sender.mark(Marker(id=1, seq=11))
        assert sender.drop(2, "slow") == Lost(0, 18, "slow")
        assert sender.drop(2, "slow") is None
        assert [type(sender.take()) for _ in range(4)] == [Lost, Marker, Unit, Unit]

    def test_markers_are_kept_until_acknowledged(self):
        sender: Sender[int] = Sender(8, 1000)
        sender.push(0, 1, 0)
        sender.mark(Marker(id=1, seq=1))
        sender.take(), sender.take()
        sender.rewind(1)
        assert sender.take() == Marker(id=1, seq=1)
        sender.ack(1, marker=1)
        assert sender.entries == 0

    def test_units_that_arrived_take_the_markers_before_them_along(self):
        sender: Sender[int] = Sender(8, 1000)
        sender.push(0, 1, 0)
        sender.mark(Marker(id=1, seq=1))
        sender.push(1, 1, 0)
        sender.take(), sender.take(), sender.take()
        sender.rewind(2)
        assert sender.entries == 0

    def test_floods_of_markers_and_losses_stay_small(self):
        sender: Sender[int] = Sender(8, 1000)
        for i in range(500):
            sender.lose(1, "source")
            sender.mark(Marker(id=i + 1, seq=sender.next))
            assert sender.entries <= 2 * 8 + 4 * link.MAX_MARKERS + 4
        taken = []
        while sender.front() is not None:
            taken.append(sender.take())
            assert sender.entries <= 2 * 8 + 4 * link.MAX_MARKERS + 4
        assert taken[0] == Lost(0, 484, "source") or taken[0] == Lost(0, 485, "source")
        assert [entry.id for entry in taken if isinstance(entry, Marker)] == list(range(485, 501))

    def test_ready_respects_limit_likeness_and_what_stands_behind(self):
        sender: Sender[int] = Sender(64, 1000, limit=3)
        assert sender.ready(4) == (0, False)
        for i in (0, 0, 1, 1, 1):
            sender.push(i, 1, 0)
        assert sender.ready(2) == (2, True)
        assert sender.ready(9) == (3, False)
        assert sender.ready(9, lambda a, b: a == b) == (2, True)
        sender.ack(0, limit=5)
        sender.ack(0, limit=1)  # never lower
        assert sender.ready(9) == (5, False)
        sender.mark(Marker(id=1, seq=5))
        assert sender.ready(9) == (5, True)


class TestReceiver:
    def test_each_number_once(self):
        receiver = Receiver("codes")
        assert receiver.take(0, 3) == (range(0), range(3))
        assert receiver.take(1, 4) == (range(3, 3), range(3, 5))
        assert receiver.take(0, 2)[1] == range(5, 5)
        assert receiver.take(7) == (range(5, 7), range(7, 8))
        assert receiver.take(5) == (range(8, 8), range(8, 8))
        assert (receiver.received, receiver.lost, receiver.repeated, receiver.next) == (6, 2, 5, 8)

    def test_too_far_ahead(self):
        receiver = Receiver("codes")
        with pytest.raises(WireError, match="ahead"):
            receiver.take(messages.MAX_GAP + 1)
        with pytest.raises(WireError, match="last number"):
            Receiver("codes", messages.MAX_SEQ).take(messages.MAX_SEQ)
        assert receiver.next == 0

    def test_markers_once_and_in_place(self):
        receiver = Receiver("codes")
        assert receiver.mark(Marker(id=1, seq=2)) == (range(2), True)
        assert receiver.mark(Marker(id=1, seq=2)) == (range(2, 2), False)


class TestCodesOut:
    def test_bundles(self):
        out = codes_out(bundle=3)
        assert out.pull(0) is None
        for seq in range(4):
            out.push(block(seq), 0)
        first = out.pull(0)
        assert isinstance(first, Codes)
        assert (first.seq, first.rate, first.at, len(first.data)) == (0, None, None, 150)
        assert out.pull(0) is None
        assert out.due() == 3 * BLOCK_NS
        late = out.pull(3 * BLOCK_NS)
        assert isinstance(late, Codes)
        assert (late.seq, len(late.data)) == (3, 50)
        assert out.due() is None

    def test_a_marker_a_rate_switch_or_a_flushed_block_closes_a_bundle(self):
        out = codes_out(bundle=8)
        out.push(block(0), 0)
        out.push(block(1, 50), 0)
        out.push(block(2, 50), 0)
        out.mark(flush=True, at=15000, tag=9)
        out.push(Block(bytes(25), 50, 15000), 0)
        out.push(Block(bytes(25), 50, 15000 + 5120), 0)
        out.sender.lose(2, "source")
        seen = [out.pull(0) for _ in range(5)]
        assert [(m.seq, len(m.data), m.rate, m.at) for m in seen if isinstance(m, Codes)] == [
            (0, 50, None, None),
            (1, 50, 50, None),
            (3, 50, 50, 15000),
        ]
        assert seen[2] == Marker(id=1, seq=3, flush=True, at=15000, tag=9)
        assert seen[4] == Missing(5, 7, "source", total=2)

    def test_a_jump_in_time_closes_a_bundle(self):
        out = codes_out(bundle=2)
        for at in (0, 9000, 9000 + 5120):
            out.push(Block(bytes(50), 100, at), 0)
        assert [(len(m.data), m.at) for m in (out.pull(0), out.pull(0))] == [(50, None), (100, 9000)]

    def test_what_the_other_end_would_refuse_is_refused_here(self):
        for bad in (Block(bytes(49), 100, 0), Block(bytes(50), 99, 0), Block(bytes(50), 100, 0, b"x")):
            with pytest.raises(CorruptedError):
                codes_out().push(bad, 0)
        with pytest.raises(WireError):
            codes_out().push(Block(bytes(50), 100, messages.MAX_SEQ), 0)
        with pytest.raises(WireError):
            AudioOut(Sender(8, 1000)).push(Chunk(b"", 0), 0)

    def test_credit(self):
        out = codes_out(limit=2)
        for seq in range(3):
            out.push(block(seq), 0)
        assert [out.pull(0).seq for _ in range(2)] == [0, 1]
        assert (out.pull(0), out.due()) == (None, None)
        out.sender.ack(2, limit=3)
        assert out.pull(0).seq == 2

    @pytest.mark.parametrize("copies", [0, 1, 3, 8])
    @pytest.mark.parametrize("dropped", [1, 3, 5])
    def test_copies_recover_what_was_dropped(self, copies: int, dropped: int):
        out = codes_out(copies=copies)
        inlet = Inlet("codes", MINI, 100, 64)
        for seq in range(2):
            out.push(block(seq), 0)
        found = [part for _ in range(2) for part in inlet.take(out.pull(0))]
        for seq in range(2, 4 + dropped):
            out.push(block(seq), 0)
        out.sender.drop(2, "slow")
        while (message := out.pull(0)) is not None:
            found += inlet.take(decode(encode(message)))
        got = {part.seq: part for part in found if isinstance(part, Arrived)}
        lost = [part for part in found if isinstance(part, Lost)]
        recovered = min(copies, dropped)
        assert lost == ([Lost(2, 2 + dropped - recovered, "slow")] if dropped > copies else [])
        assert {seq for seq, part in got.items() if part.copy} == set(range(2 + dropped - recovered, 2 + dropped))
        assert all(number(part.item) == seq and part.item.at == seq * 5120 for seq, part in got.items())
        assert all(part.item.rate == 25 for part in got.values() if part.copy)
        assert (inlet.receiver.recovered, inlet.receiver.lost) == (recovered, dropped - recovered)


class TestInlet:
    def test_hostile_codes(self):
        inlet = Inlet("codes", MINI, 100, 64)
        bad = [
            Codes(seq=0, data=bytes(49)),
            Codes(seq=0, data=bytes(75)),
            Codes(seq=0, data=bytes(50), rate=99),
            Codes(seq=9, data=bytes(50), copies=bytes(13 * 9), copy_rate=25),
            Codes(seq=9, data=bytes(50), copies=bytes(12), copy_rate=25),
            Codes(seq=9, data=bytes(50), copies=bytes(25), copy_rate=50),
            Codes(seq=0, data=bytes(50), at=messages.MAX_SEQ - 5),
            Codes(seq=messages.MAX_GAP + 1, data=bytes(50)),
        ]
        for message in bad:
            with pytest.raises(WireError):
                inlet.take(message)
        assert (inlet.receiver.next, inlet.receiver.received) == (0, 0)

    def test_copies_from_before_the_beginning_are_ignored(self):
        inlet = Inlet("codes", MINI, 100, 64, first=10)
        found = inlet.take(Codes(seq=10, data=block(10).data, copies=bytes(13 * 8), copy_rate=25))
        assert [part.seq for part in found] == [10]

    def test_acks_are_due_after_a_quarter_of_the_window(self):
        inlet = Inlet("audio", MINI, 100, 8)
        inlet.take(Audio(0, 0, b"ab"))
        assert not inlet.ack_due
        inlet.take(Audio(1, 1, b"ab"))
        assert inlet.ack_due
        assert inlet.ack(7) == messages.Ack(2, 7, "audio")
        assert not inlet.ack_due


class Air:
    """One direction of a stream over a link that loses, repeats and reorders messages, and breaks."""

    def __init__(self, seed: int, window: int, bundle: int, copies: int):
        self.rng = random.Random(seed)
        self.window = window
        self.out = codes_out(window, bundle=bundle, copies=copies)
        self.inlet = Inlet("codes", MINI, 100, window)
        self.air: list[bytes] = []
        self.found: list[Arrived[Block] | Lost | Marker] = []
        self.sent = self.now = 0

    def push(self):
        for _ in range(self.rng.randint(1, 6)):
            self.out.push(block(self.sent), self.now)
            self.sent += 1

    def mark(self):
        self.out.mark(tag=self.sent)

    def drop(self):
        self.out.sender.drop(self.rng.randint(0, 3), "slow")

    def cut(self):
        self.air.clear()
        self.out.sender.rewind(self.inlet.receiver.next)

    def repeat(self):
        self.air += self.rng.sample(self.air, min(1, len(self.air)))

    def reorder(self):
        self.rng.shuffle(self.air)

    def send(self):
        while (message := self.out.pull(self.now)) is not None:
            self.air.append(encode(message))

    def arrive(self):
        if self.air:
            self.found += self.inlet.take(decode(self.air.pop(0)))

    def ack(self):
        ack = self.inlet.ack()
        self.out.sender.ack(ack.next, ack.marker)

    def step(self):
        actions = (
            self.push,
            self.mark,
            self.drop,
            self.cut,
            self.repeat,
            self.reorder,
            self.send,
            self.arrive,
            self.ack,
        )
        self.now += BLOCK_NS // 4
        self.rng.choices(actions, weights=(8, 1, 1, 2, 1, 1, 3, 6, 4))[0]()
        assert self.out.sender.kept <= self.window
        assert self.out.sender.entries <= 2 * self.window + 4 * link.MAX_MARKERS + 4
        assert len(self.out._recent) <= self.window


@given(seed=st.integers(0, 2**32 - 1), copies=st.integers(0, 4), bundle=st.integers(1, 5), window=st.integers(4, 40))
def test_exactly_once_or_reported_over_any_link(seed: int, copies: int, bundle: int, window: int):
    """Each block at most once and in order, and those that never come are reported, each once."""
    air = Air(seed, window, bundle, copies)
    for _ in range(150):
        air.step()
    air.cut()
    air.out.mark(flush=True)
    air.send()
    while air.air:
        air.arrive()
    told: list[int] = []
    tags: list[int] = []
    for part in air.found:
        if isinstance(part, Arrived):
            assert number(part.item) == part.seq
            assert part.item.at == part.seq * 5120
            told.append(part.seq)
        elif isinstance(part, Lost):
            told += range(part.seq, part.stop)
        elif not part.flush:
            assert part.tag <= len(told)  # every block before a marker has been told of by then
            tags.append(part.tag)
    assert told == list(range(air.sent))
    assert tags == sorted(tags)
