"""Codes <-> tokens: round trips of every layout, the grammar step by step, text, JSON, and what is refused."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from semanticodec import PRESETS, CodesError, ConfigError, StreamDecoder, TokenDecoder, TokensError, Vocabulary, preset
from semanticodec.config import RATES, VOCABULARIES
from semanticodec.tokens import Layout

LAYOUTS = get_args(Layout)
SMALL = Vocabulary("flat", 25, (5, 7), "small")
"""PAD 0, BOS 1, EOS 2, tags 3-5, semantic codes 6-10, acoustic codes 11-17."""
CODES = np.array([[4, 0, 2], [6, 1, 0]])


@st.composite
def vocabularies(draw: st.DrawFn) -> Vocabulary:
    sizes = draw(
        st.tuples(st.sampled_from(VOCABULARIES), st.just(8192)) | st.tuples(st.integers(1, 9), st.integers(1, 9))
    )
    return Vocabulary(
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from(RATES)),
        sizes,
        first=draw(st.sampled_from([0, 1, 128_266])),
        delay=draw(st.integers(1, 4)),
    )


@st.composite
def recordings(draw: st.DrawFn) -> tuple[Vocabulary, np.ndarray]:
    vocabulary, frames = draw(vocabularies()), draw(st.integers(0, 12))
    streams = [
        draw(st.lists(st.integers(0, n - 1), min_size=frames, max_size=frames)) for n in vocabulary.codebook_sizes
    ]
    return vocabulary, np.array(streams, np.uint16).reshape(2, frames)


def heard(vocabulary: Vocabulary, codes: np.ndarray) -> np.ndarray:
    """Return what is left of the codes in this layout."""
    codes = codes.astype(np.int64)
    if vocabulary.layout == "semantic":
        codes[1] = -1
    return codes


@given(recordings())
def test_every_layout_goes_both_ways(recording):
    vocabulary, codes = recording
    ids = vocabulary.encode(codes)
    assert ids.dtype == np.int64
    assert ids.shape[:-1] == ((2,) if vocabulary.layout == "delay" else ())
    assert ids.size == 0 or (vocabulary.first <= ids.min() and ids.max() < vocabulary.size)
    np.testing.assert_array_equal(vocabulary.decode(ids), heard(vocabulary, codes))
    padded = np.concatenate([ids, np.full((*ids.shape[:-1], 3), vocabulary.pad)], -1)
    np.testing.assert_array_equal(vocabulary.decode(padded), heard(vocabulary, codes))


def test_the_layouts_as_documented():
    flat = [1, 3, 10, 17, 6, 12, 8, 11, 2]
    assert SMALL.encode(CODES).tolist() == flat
    assert replace(SMALL, first=100).encode(CODES).tolist() == [100 + index for index in flat]
    assert replace(SMALL, token_rate=100).encode(CODES)[1] == 5
    assert replace(SMALL, layout="sequential").encode(CODES).tolist() == [1, 3, 10, 6, 8, 17, 12, 11, 2]
    assert replace(SMALL, layout="semantic").encode(CODES).tolist() == [1, 3, 10, 6, 8, 2]
    delay = replace(SMALL, layout="delay")
    assert delay.encode(CODES).tolist() == [[1, 3, 10, 6, 8, 2, 0], [1, 3, 0, 12, 7, 6, 2]]
    assert replace(delay, delay=2).encode(CODES).tolist() == [[1, 3, 10, 6, 8, 2, 0, 0], [1, 3, 0, 0, 12, 7, 6, 2]]


def test_an_open_end_is_a_prefix_of_the_whole_and_of_any_continuation():
    longer = np.concatenate([CODES, CODES[:, ::-1]], 1)
    for layout in ("flat", "semantic", "delay"):
        vocabulary = replace(SMALL, layout=layout)
        prompt = vocabulary.encode(CODES, eos=False)
        np.testing.assert_array_equal(prompt, vocabulary.encode(longer)[..., : prompt.shape[-1]])
    np.testing.assert_array_equal(SMALL.decode(SMALL.encode(CODES, eos=False), partial=True), CODES)
    late = replace(SMALL, layout="delay").encode(CODES, eos=False)
    assert replace(SMALL, layout="delay").decode(late, partial=True).tolist() == [[4, 0, 2], [6, 1, -1]]


@pytest.mark.parametrize("name", PRESETS)
def test_vocabularies_of_the_presets(name: str):
    config = preset(name)
    semantic, acoustic = config.codebook_sizes
    assert Vocabulary.of(config).size == 6 + semantic + acoustic
    assert Vocabulary.of(config, "semantic").size == 6 + semantic
    assert Vocabulary.of(config, "delay", first=9).size == 9 + 6 + max(semantic, acoustic)
    assert Vocabulary.of(config).rate_tag == {25: 3, 50: 4, 100: 5}[config.token_rate]
    assert Vocabulary.of(config).model == name


# --- in pieces ---------------------------------------------------------------------------------------------------


@given(recordings(), st.lists(st.integers(1, 7), min_size=1), st.integers(1, 5))
def test_any_cut_of_the_ids_gives_the_same_codes(recording, cuts, block):
    vocabulary, codes = recording
    ids = vocabulary.encode(codes)
    decoder, start, pieces = TokenDecoder(vocabulary), 0, []
    while start < ids.shape[-1]:
        step = cuts[start % len(cuts)]
        pieces.append(decoder.push(ids[..., start : start + step]))
        start += step
    assert decoder.ended
    assert decoder.flush().shape == (2, 0)
    np.testing.assert_array_equal(np.concatenate(pieces, 1), heard(vocabulary, codes))
    blocks = list(vocabulary.iter_codes(ids.T, block))
    assert [b.shape[1] for b in blocks[:-1]] == [block] * (len(blocks) - 1)
    np.testing.assert_array_equal(np.concatenate([np.zeros((2, 0), int), *blocks], 1), heard(vocabulary, codes))


@given(recordings(), st.data())
def test_any_beginning_of_a_sequence_is_taken_and_what_it_does_not_reach_is_missing(recording, data):
    vocabulary, codes = recording
    ids = vocabulary.encode(codes)
    cut = data.draw(st.integers(0, ids.shape[-1]))
    found, whole = vocabulary.decode(ids[..., :cut], partial=True), heard(vocabulary, codes)[:, :cut]
    np.testing.assert_array_equal(found[0], whole[0, : found.shape[1]])
    np.testing.assert_array_equal(found[1][found[1] >= 0], whole[1, : (found[1] >= 0).sum()])
    assert (np.diff((found[1] >= 0).astype(int)) <= 0).all()  # missing ones stand at the end


def test_blocks_come_as_soon_as_they_are_complete():
    asked = 0

    def generated():
        nonlocal asked
        for index in SMALL.encode(CODES):
            asked += 1
            yield int(index)

    arrived = [(block.tolist(), asked) for block in SMALL.iter_codes(generated(), 2)]
    assert arrived == [([[4, 0], [6, 1]], 6), ([[2], [0]], 9)]
    with pytest.raises(ConfigError, match="at least one frame"):
        next(SMALL.iter_codes([1], 0))


def test_a_flushed_decoder_stands_where_it_began():
    decoder = TokenDecoder(SMALL)
    decoder.push(SMALL.encode(CODES)[:5])
    assert decoder.flush().tolist() == [[0], [-1]]
    np.testing.assert_array_equal(decoder.push(SMALL.encode(CODES)), CODES)


def test_a_generated_stream_becomes_the_sound_of_the_file():
    codec = tiny.codec("mini", 25)
    vocabulary = Vocabulary.of(codec.config)
    codes = tiny.random_codes(codec.config, 24)
    stream = StreamDecoder(codec, seed=3)
    blocks = vocabulary.iter_codes(vocabulary.encode(codes[0]), codec.config.group)
    sound = torch.cat([*(stream.push(block[None]) for block in blocks), stream.flush()], 1)
    assert torch.equal(sound, codec.decode(codes, seed=3))


# --- what may come next ------------------------------------------------------------------------------------------


@given(vocabularies(), st.integers(0, 2**32 - 1))
def test_every_walk_through_the_allowed_ids_is_a_sequence_and_every_other_id_is_refused(vocabulary, seed):
    rng, decoder, ids = np.random.default_rng(seed), TokenDecoder(vocabulary), []
    for _ in range(30):
        masks = decoder.allowed()
        step = [int(rng.choice(np.flatnonzero(mask))) for mask in masks]
        for row, mask in enumerate(masks):
            if not mask.all():
                wrong = [*step[:row], int(rng.choice(np.flatnonzero(~mask))), *step[row + 1 :]]
                spoiled = np.array([*ids, wrong]).T
                with pytest.raises(TokensError) as caught:
                    vocabulary.decode(spoiled if vocabulary.rows > 1 else spoiled[0], partial=True)
                assert caught.value.position == len(ids)
        column = np.array([step]).T
        decoder.push(column if vocabulary.rows > 1 else column[0])
        ids.append(step)
    if decoder.ended:
        array = np.array(ids).T if vocabulary.rows > 1 else np.array(ids)[:, 0]
        codes = vocabulary.decode(array)
        if vocabulary.layout != "semantic":
            again = vocabulary.encode(codes)
            np.testing.assert_array_equal(again, array[..., : again.shape[-1]])


@pytest.mark.parametrize(
    ("layout", "ids", "message"),
    [
        ("flat", [10], r"token 0: seen semantic code 4 \(id 10\), wanted is <\|audio_bos\|> \(id 1\)"),
        ("flat", [1, 5], r"token 1: seen <\|rate_100\|> \(id 5\), wanted is <\|rate_25\|> \(id 3\)"),
        ("flat", [1, 3, 12], r"token 2: seen acoustic code 1 .* wanted is semantic code 0 \(id 6\) to 4 \(id 10\) or"),
        ("flat", [1, 3, 6, 7], r"token 3: seen semantic code 1"),
        ("flat", [1, 3, 6, 2], r"token 3: seen <\|audio_eos\|> .* wanted is acoustic code 0 \(id 11\) to 6 \(id 17\)"),
        ("flat", [1, 3, 6, 18], r"id 18, outside this vocabulary of 0 to 17"),
        ("flat", [1, 3, -1], r"id -1, outside"),
        ("flat", [1, 3, 2, 1], r"token 3: seen <\|audio_bos\|> .* wanted is <\|audio_pad\|>"),
        ("flat", [1, 3, 6], r"token 3: the sequence ends, .*partial=True"),
        ("sequential", [1, 3, 11], r"token 2: seen acoustic code 0"),
        ("sequential", [1, 3, 6, 2], r"token 3: seen <\|audio_eos\|>"),
        ("sequential", [1, 3, 6, 11, 7], r"token 4: seen semantic code 1"),
        ("sequential", [1, 3, 6, 11, 12], r"token 4: seen acoustic code 1 .* wanted is <\|audio_eos\|>"),
        ("semantic", [1, 3, 6, 11], r"token 3: seen id 11, outside this vocabulary of 0 to 10"),
        ("delay", [[1, 3, 6], [1, 3, 6]], r"token 2 of row 1: seen acoustic code 0 .* wanted is <\|audio_pad\|>"),
        ("delay", [[1, 3, 11], [1, 3, 0]], r"token 2 of row 0: seen id 11, outside"),
        ("delay", [[1, 3, 6, 2], [1, 3, 0, 2]], r"token 3 of row 1: seen <\|audio_eos\|> .* acoustic code 0 \(id 6\)"),
        ("flat", [[1, 3]], r"integers \[tokens\], seen int64 \[1, 2\]"),
        ("flat", [1.0, 3.0], r"integers \[tokens\], seen float64"),
        ("delay", [1, 3], r"integers \[2, tokens\], seen int64 \[2\]"),
        ("delay", [[1, 3]], r"integers \[2, tokens\], seen int64 \[1, 2\]"),
    ],
)
def test_malformed_sequences_say_what_was_seen_and_wanted(layout: Layout, ids: list[int], message: str):
    with pytest.raises(TokensError, match=message):
        replace(SMALL, layout=layout).decode(ids)


def test_what_came_before_a_mistake_is_not_lost():
    decoder = TokenDecoder(SMALL)
    with pytest.raises(TokensError):
        decoder.push([1, 3, 10, 17, 6, 6])
    assert decoder.flush().tolist() == [[4, 0], [6, -1]]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[5], [0]], "semantic codes from 5 to 5 are outside the codebook, 0 to 4"),
        ([[0], [7]], "acoustic codes from 7 to 7 are outside"),
        ([[0], [-1]], "no word for missing codes"),
        ([[0, 1]], r"seen int64 \[1, 2\]"),
        ([[[0], [1]]], "rows of a batch one by one"),
        ([[0.0], [1.0]], "seen float64"),
    ],
)
def test_codes_that_no_token_stands_for(codes: list[list[int]], message: str):
    with pytest.raises(CodesError, match=message):
        SMALL.encode(codes)


def test_the_semantic_layout_does_not_look_at_acoustic_codes():
    vocabulary = replace(SMALL, layout="semantic")
    assert vocabulary.encode([[1], [-1]]).tolist() == vocabulary.encode([[1], [3]]).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "spiral"}, "choose one of flat, sequential, semantic, delay"),
        ({"token_rate": 75}, r"choose one of \[25, 50, 100\]"),
        ({"codebook_sizes": (5,)}, "two codebooks"),
        ({"codebook_sizes": (5, 0)}, "two codebooks"),
        ({"first": -1}, "first must be 0 or more"),
        ({"delay": 0}, "delay 1 or more"),
        ({"first": 0.0}, "whole numbers"),
        ({"first": True}, "whole numbers"),
        ({"codebook_sizes": 8}, "two codebooks"),
        ({"model": 5}, "name of a preset"),
    ],
)
def test_impossible_vocabularies(change: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **change)


# --- text, tokenizers, JSON --------------------------------------------------------------------------------------


@given(recordings(), st.lists(st.integers(1, 9), min_size=1))
def test_text_goes_both_ways_however_it_is_cut(recording, cuts):
    vocabulary, codes = recording
    vocabulary = replace(vocabulary, layout="flat") if vocabulary.layout == "delay" else vocabulary
    ids = vocabulary.encode(codes)
    text = vocabulary.to_text(ids)
    assert vocabulary.from_text(text).tolist() == ids.tolist()
    starts = [0]
    while starts[-1] < len(text):
        starts.append(starts[-1] + cuts[len(starts) % len(cuts)])
    assert list(vocabulary.iter_text(text[a:b] for a, b in pairwise(starts))) == ids.tolist()


def test_text_as_documented():
    text = "<|audio_bos|><|rate_25|><|s_4|><|a_6|><|s_0|><|a_1|><|s_2|><|a_0|><|audio_eos|>"
    assert SMALL.to_text(SMALL.encode(CODES)) == text
    pieces = iter(["<|audio_bos|><|ra", "te_25|>", "<"])
    assert [next(ids) for ids in [SMALL.iter_text(pieces)] for _ in range(2)] == [1, 3]


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("<|audio_bos|> <|rate_25|>", 1),
        ("<|audio_bos|><|s_5|>", 1),
        ("<|s_1|><|s_2", 1),
        ("<|s_01|>", 0),
        ("hello", 0),
        ("<|S_1|>", 0),
        ("<|" + "s" * 99, 0),
    ],
)
def test_text_that_is_no_token(text: str, position: int):
    for pieces in ([text], list(text)):
        with pytest.raises(TokensError, match=f"where token {position} should be stands") as caught:
            list(SMALL.iter_text(pieces))
        assert caught.value.position == position


def test_endless_text_is_refused_before_it_ends():
    with pytest.raises(TokensError):
        list(SMALL.iter_text("<|" if index == 0 else "s" for index in iter(int, 1)))


def test_text_of_foreign_ids_and_of_two_rows():
    with pytest.raises(TokensError, match="token 1 is id 18, outside") as caught:
        SMALL.to_text([1, 18])
    assert caught.value.position == 1
    with pytest.raises(TokensError, match="token 0 is id 5"):
        replace(SMALL, first=6).to_text([5])
    with pytest.raises(ConfigError, match="write another layout"):
        replace(SMALL, layout="delay").to_text([1])
    for ids in ([1.9], [[1, 2], [1, 2]]):
        with pytest.raises(TokensError, match="whole numbers"):
            SMALL.to_text(ids)


def test_lists_of_sizes_are_tuples():
    vocabulary = replace(SMALL, codebook_sizes=list(SMALL.codebook_sizes))
    assert vocabulary == SMALL
    assert hash(vocabulary) == hash(SMALL)


def test_a_tokenizer_takes_the_tokens_with_their_ids():
    words = {"[UNK]": 0, "say": 1, "this": 2}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    vocabulary = replace(SMALL, first=len(words))
    entries = vocabulary.added_tokens()
    for entry in entries:
        added = AddedToken(**{key: value for key, value in entry.items() if key != "id"})
        assert tokenizer.add_tokens([added]) == 1
    assert [tokenizer.token_to_id(entry["content"]) for entry in entries] == [entry["id"] for entry in entries]
    saved = json.loads(tokenizer.to_str())["added_tokens"]
    assert saved == entries
    ids = vocabulary.encode(CODES)
    assert tokenizer.encode("say" + vocabulary.to_text(ids)).ids == [1, *ids.tolist()]
    assert len(entries) == vocabulary.size - vocabulary.first


@given(vocabularies())
def test_json_goes_both_ways(vocabulary):
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary


def test_the_descriptor_tells_another_program_all_it_needs():
    found = json.loads(replace(SMALL, first=10).to_json())
    assert found["special"]["<|audio_eos|>"] == 12
    assert found["special"]["<|rate_25|>"] == 13
    assert found["streams"] == [
        {"name": "semantic", "row": 0, "first": 16, "size": 5},
        {"name": "acoustic", "row": 0, "first": 21, "size": 7},
    ]
    assert (found["size"], found["rows"], found["token_rate"], found["layout"]) == (28, 1, 25, "flat")
    rows = replace(SMALL, layout="delay", delay=3).descriptor()
    assert [(stream["row"], stream["first"]) for stream in rows["streams"]] == [(0, 6), (1, 6)]
    assert (rows["size"], rows["rows"], rows["delay"]) == (13, 2, 3)
    assert [stream["name"] for stream in replace(SMALL, layout="semantic").descriptor()["streams"]] == ["semantic"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 99}, r"contradicts itself in \['size'\]"),
        ({"extra": 1}, r"contradicts itself in \['extra'\]"),
        ({"version": 2}, "read it with the version that wrote it"),
        ({"format": "other"}, "wanted"),
        ({"layout": "spiral"}, "choose one of"),
        ({"codebook_sizes": 5}, "no descriptor"),
        ({"first": None}, "whole numbers"),
    ],
)
def test_damaged_descriptors(change: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Vocabulary.from_json(json.dumps(SMALL.descriptor() | change))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000])
def test_json_that_is_no_descriptor(text: str):
    with pytest.raises(ConfigError, match="no descriptor"):
        Vocabulary.from_json(text)
