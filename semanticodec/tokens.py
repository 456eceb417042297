"""Codes as tokens of a language model, and back.

A sequence is ``BOS RATE codes EOS``, in one of these layouts (s: semantic, a: acoustic code of a frame):

* ``flat``: ``s0 a0 s1 a1 ...``, frame by frame;
* ``sequential``: ``s0 s1 ... a0 a1 ...``, all semantic codes before the first acoustic one;
* ``semantic``: ``s0 s1 ...``, for a model whose acoustic codes come from elsewhere;
* ``delay``: two rows predicted side by side, the acoustic one ``delay`` columns later, so that a step knows the
  semantic code of the frame whose acoustic code it predicts::

      BOS RATE s0  s1 s2 EOS PAD
      BOS RATE PAD a0 a1 a2  EOS

Ids count from ``first``: PAD, BOS, EOS, the tags of the token rates 25, 50 and 100, the semantic codebook, the acoustic
codebook.  In the layout ``delay`` each row has its own output, and both codebooks begin behind the tags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal, get_args

import numpy as np

from .config import MISSING, STACKING, CodecConfig, TokenRate
from .errors import CodesError, ConfigError, TokensError

Layout = Literal["flat", "sequential", "semantic", "delay"]
STREAMS = ("semantic", "acoustic")
SPECIAL = ("<|audio_pad|>", "<|audio_bos|>", "<|audio_eos|>", *(f"<|rate_{rate}|>" for rate in sorted(STACKING)))
"""How the special tokens are written, in the order of their ids."""
HEADER = 2
"""Tokens before the first code: BOS and the tag of the token rate."""
FORMAT, VERSION = "semanticodec-tokens", 1

_TOKEN = re.compile(r"<\|[a-z_0-9]+\|>")
_BEGUN = re.compile(r"(<(\|([a-z_0-9]{0,24}\|?)?)?)?")  # what may still become a token


@dataclass(frozen=True)
class Vocabulary:
    """Which id stands for what, and the two pure functions between codes and ids: :meth:`encode`, :meth:`decode`.

    Attributes:
        layout: order of the codes, see the module.
        token_rate: of the codec; its tag begins every sequence.
        codebook_sizes: entries of the (semantic, acoustic) codebook.
        model: name of the preset whose codes these are, for people; "" if there is none.
        first: the first id, behind those of a text model that is extended.
        delay: columns by which the acoustic row of the layout ``delay`` is late, at least 1.
    """

    layout: Layout
    token_rate: TokenRate
    codebook_sizes: tuple[int, int]
    model: str = ""
    first: int = 0
    delay: int = 1

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ConfigError(f"layout {self.layout!r} is unknown; choose one of {', '.join(get_args(Layout))}")
        if self.token_rate not in STACKING:
            raise ConfigError(f"token rate {self.token_rate!r} is unknown; choose one of {sorted(STACKING)}")
        if not isinstance(self.codebook_sizes, tuple | list):
            raise ConfigError(f"two codebooks of at least one entry are wanted, seen sizes {self.codebook_sizes}")
        object.__setattr__(self, "codebook_sizes", tuple(self.codebook_sizes))
        if not all(type(number) is int for number in (*self.codebook_sizes, self.first, self.delay)):
            raise ConfigError(f"sizes, first and delay are whole numbers, seen {self}")
        if not isinstance(self.model, str):
            raise ConfigError(f"model is the name of a preset, seen {self.model!r}")
        if len(self.codebook_sizes) != 2 or min(self.codebook_sizes) < 1:
            raise ConfigError(f"two codebooks of at least one entry are wanted, seen sizes {self.codebook_sizes}")
        if self.first < 0 or self.delay < 1:
            raise ConfigError(f"first must be 0 or more and delay 1 or more, seen {self.first} and {self.delay}")

    @classmethod
    def of(cls, config: CodecConfig, layout: Layout = "flat", *, first: int = 0, delay: int = 1) -> Vocabulary:
        """Return the vocabulary of a codec's codes."""
        return cls(layout, config.token_rate, config.codebook_sizes, config.name, first, delay)

    # --- ids ------------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Tokens per step: 2 in the layout ``delay``, otherwise 1."""
        return 2 if self.layout == "delay" else 1

    @property
    def pad(self) -> int:
        """Id that fills what belongs to no sequence."""
        return self.first

    @property
    def bos(self) -> int:
        """Id that begins a sequence."""
        return self.first + 1

    @property
    def eos(self) -> int:
        """Id that ends a sequence."""
        return self.first + 2

    @property
    def rate_tag(self) -> int:
        """Id of the tag of :attr:`token_rate`."""
        return self.first + 3 + sorted(STACKING).index(self.token_rate)

    @property
    def semantic(self) -> range:
        """Ids of the semantic codebook."""
        start = self.first + len(SPECIAL)
        return range(start, start + self.codebook_sizes[0])

    @property
    def acoustic(self) -> range:
        """Ids of the acoustic codebook; none in the layout ``semantic``."""
        start = self.semantic.start if self.layout == "delay" else self.semantic.stop
        return range(start, start + (0 if self.layout == "semantic" else self.codebook_sizes[1]))

    @property
    def size(self) -> int:
        """One more than the largest id: how many a model must know."""
        return max(self.semantic.stop, self.acoustic.stop)

    # --- codes to ids and back ------------------------------------------------------------------------------------

    def encode(self, codes: Any, *, eos: bool = True) -> np.ndarray:
        """Turn the codes of one recording into ids.

        Args:
            codes: integers ``[2, F]``, row 0 semantic and row 1 acoustic, any F.
            eos: False leaves the end open, as the prompt of a continuation; the layout ``delay`` then ends with the
                column of the last semantic code, without the last ``delay`` acoustic ones.

        Returns:
            int64 ``[T]``; in the layout ``delay`` ``[2, T]``.

        Raises:
            CodesError: wrong shape or dtype, or a code outside its codebook (missing ones included).
        """
        streams = self._checked(codes)
        semantic = streams[0] + self.semantic.start
        acoustic = streams[-1] + self.acoustic.start
        if self.layout == "delay":
            frames, body = semantic.size, np.full((2, semantic.size + self.delay + 1), self.pad)
            body[0, :frames], body[0, frames] = semantic, self.eos
            body[1, self.delay : -1], body[1, -1] = acoustic, self.eos
            body = body if eos else body[:, :frames]
        else:
            if self.layout == "flat":
                body = np.stack([semantic, acoustic], 1).reshape(-1)
            else:
                body = semantic if self.layout == "semantic" else np.concatenate([semantic, acoustic])
            body = np.append(body, self.eos) if eos else body
        header = np.broadcast_to([self.bos, self.rate_tag], (*body.shape[:-1], HEADER))
        return np.concatenate([header, body], -1)

    def decode(self, ids: Any, *, partial: bool = False) -> np.ndarray:
        """Turn the ids of one recording into codes; the inverse of :meth:`encode`.

        Args:
            ids: integers ``[T]`` (layout ``delay``: ``[2, T]``); PAD may follow EOS.
            partial: take a sequence that ends early; acoustic codes that it does not reach are -1.

        Returns:
            Codes int64 ``[2, F]``; in the layout ``semantic`` all acoustic ones are -1 (missing), which the codec's
            decoder fills in.

        Raises:
            TokensError: an id stands where the layout has no place for it, or the end is missing.
        """
        decoder = TokenDecoder(self)
        codes = decoder.push(ids)
        if not (partial or decoder.ended):
            raise decoder.expected("the sequence ends", "pass partial=True to take what there is")
        return np.concatenate([codes, decoder.flush()], 1)

    def iter_codes(self, ids: Iterable[Any], frames: int) -> Iterator[np.ndarray]:
        """Decode ids as they are generated, block by block.

        Args:
            ids: one id after another (layout ``delay``: columns of two), from BOS on; may end anywhere.
            frames: frames of a block, for instance the codec's ``config.group``, which is one step in time.

        Yields:
            Codes int64 ``[2, frames]`` as soon as they are complete; the last block may be shorter, and its acoustic
            codes -1 where the ids ended early.

        Raises:
            TokensError: an id stands where the layout has no place for it.
        """
        if frames < 1:
            raise ConfigError(f"a block has at least one frame, seen {frames}")
        decoder, held = TokenDecoder(self), np.zeros((2, 0), np.int64)
        for step in ids:
            held = np.concatenate([held, decoder.push(np.asarray(step)[..., None])], 1)
            while held.shape[1] >= frames:
                yield held[:, :frames]
                held = held[:, frames:]
        held = np.concatenate([held, decoder.flush()], 1)
        yield from (held[:, start : start + frames] for start in range(0, held.shape[1], frames))

    def _checked(self, codes: Any) -> np.ndarray:
        """Return the streams that this layout holds, int64 ``[1 or 2, F]``."""
        codes = np.asarray(codes)
        if codes.ndim != 2 or len(codes) != 2 or codes.dtype.kind not in "iu":
            raise CodesError(
                f"codes of one recording are integers [2, frames], seen {codes.dtype} {list(codes.shape)}; "
                "take the rows of a batch one by one"
            )
        used: np.ndarray = codes[: 1 if self.layout == "semantic" else 2].astype(np.int64)
        for name, size, stream in zip(STREAMS, self.codebook_sizes, used, strict=False):
            if stream.size and (stream.min() < 0 or stream.max() >= size):
                raise CodesError(
                    f"{name} codes from {stream.min()} to {stream.max()} are outside the codebook, 0 to {size - 1}; "
                    "tokens have no word for missing codes, and other presets have other codebooks"
                )
        return used

    # --- as text --------------------------------------------------------------------------------------------------

    @cached_property
    def names(self) -> tuple[str, ...]:
        """How every id is written, from :attr:`first` on: ``<|audio_pad|>``, ..., ``<|s_0|>``, ..., ``<|a_0|>``, ...

        Raises:
            ConfigError: the layout is ``delay``, where one id means two things.
        """
        if self.rows > 1:
            raise ConfigError("ids of the layout 'delay' mean something else in each row; write another layout as text")
        return (
            *SPECIAL,
            *(f"<|s_{code}|>" for code in range(len(self.semantic))),
            *(f"<|a_{code}|>" for code in range(len(self.acoustic))),
        )

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: self.first + index for index, name in enumerate(self.names)}

    def to_text(self, ids: Any) -> str:
        """Write ids as text, ``<|audio_bos|><|rate_25|><|s_12|><|a_7|>...``.

        Raises:
            TokensError: an id is not of this vocabulary.
        """
        words, array = [], np.asarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise TokensError(f"ids are a list of whole numbers, seen {array.dtype} of shape {array.shape}", 0)
        for position, index in enumerate(array.tolist()):
            if not self.first <= index < self.size:
                raise TokensError(f"token {position} is {self.describe(index)}; write only ids of audio", position)
            words.append(self.names[index - self.first])
        return "".join(words)

    def from_text(self, text: str) -> np.ndarray:
        """Read ids int64 ``[T]`` from text; the inverse of :meth:`to_text`.

        Raises:
            TokensError: there is anything but tokens of this vocabulary, or the last one is not whole.
        """
        return np.fromiter(self.iter_text([text]), np.int64)

    def iter_text(self, pieces: Iterable[str]) -> Iterator[int]:
        """Read ids from text that arrives in pieces, cut anywhere.

        Raises:
            TokensError: as :meth:`from_text`.
        """
        held, position = "", 0
        for piece in chain(pieces, (None,)):
            held, start = held + (piece or ""), 0
            while (match := _TOKEN.match(held, start)) and match[0] in self._ids:
                yield self._ids[match[0]]
                position, start = position + 1, match.end()
            held = held[start:]
            if held and (piece is None or not _BEGUN.fullmatch(held)):
                raise TokensError(
                    f"where token {position} should be stands {held[:32]!r}, wanted is one of {self.names[0]} to "
                    f"{self.names[-1]}; pass only the text between and with BOS and EOS, of this vocabulary",
                    position,
                )

    def added_tokens(self) -> list[dict[str, Any]]:
        """Return the tokens as entries of a ``tokenizer.json``'s "added_tokens", in the order of their ids.

        ``tokenizer.add_tokens([AddedToken(**entry) for entry in ...])`` of `tokenizers` and transformers takes them
        without the key "id"; they get these ids if the tokenizer had :attr:`first` of them before.

        Raises:
            ConfigError: as :attr:`names`.
        """
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": self.first + index, "content": name, **flags, "special": index < len(SPECIAL)}
            for index, name in enumerate(self.names)
        ]

    def describe(self, index: int, row: int = 0) -> str:
        """Say in words what an id of a row is."""
        if self.first <= index < self.semantic.start:
            return f"{SPECIAL[index - self.first]} (id {index})"
        streams = tuple(zip(STREAMS, (self.semantic, self.acoustic), strict=True))
        for stream, ids in streams[row : row + 1] if self.rows > 1 else streams:
            if index in ids:
                return f"{stream} code {index - ids.start} (id {index})"
        return f"id {index}, outside this vocabulary of {self.first} to {self.size - 1}"

    # --- as JSON --------------------------------------------------------------------------------------------------

    def descriptor(self) -> dict[str, Any]:
        """Return everything another program needs to read the ids, as plain data for JSON."""
        streams = ((name, ids) for name, ids in zip(STREAMS, (self.semantic, self.acoustic), strict=True) if ids)
        return {
            "format": FORMAT,
            "version": VERSION,
            **asdict(self),
            "codebook_sizes": list(self.codebook_sizes),
            "rows": self.rows,
            "size": self.size,
            "special": {name: self.first + index for index, name in enumerate(SPECIAL)},
            "streams": [
                {"name": name, "row": row if self.rows > 1 else 0, "first": ids.start, "size": len(ids)}
                for row, (name, ids) in enumerate(streams)
            ],
        }

    def to_json(self) -> str:
        """Write :meth:`descriptor` as JSON; :meth:`from_json` reads it back."""
        return json.dumps(self.descriptor(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """Read what :meth:`to_json` wrote.

        Raises:
            ConfigError: it is no descriptor, is of another version, or its numbers contradict each other.
        """
        try:
            data = json.loads(text)
            seen = data["format"], data["version"]
            vocabulary = cls(
                **{key: data[key] for key in cls.__dataclass_fields__} | {"codebook_sizes": (*data["codebook_sizes"],)}
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"this is no descriptor of a vocabulary: {error!r}; write it with to_json") from error
        if seen != (FORMAT, VERSION):
            raise ConfigError(
                f"the descriptor is {seen}, wanted {(FORMAT, VERSION)}; read it with the version that wrote it"
            )
        wanted = vocabulary.descriptor()
        if data != wanted:
            wrong = sorted(key for key in {*data, *wanted} if data.get(key) != wanted.get(key))
            raise ConfigError(f"the descriptor contradicts itself in {wrong}; write it anew with to_json")
        return vocabulary


class TokenDecoder:
    """Turn a stream of ids into codes, from BOS to EOS, with the frames that are complete after every push.

    It also knows what may come next, so that a model that is sampled under :meth:`allowed` writes no nonsense.

    Attributes:
        vocabulary: whose ids these are.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._restart()

    def _restart(self) -> None:
        self._taken = [0] * self.vocabulary.rows  # ids, per row
        self._open = [True] * self.vocabulary.rows  # no EOS yet, per row
        self._codes: tuple[list[int], list[int]] = ([], [])  # semantic and acoustic ones that wait for their partner
        self._frames = 0  # handed out

    @property
    def ended(self) -> bool:
        """Whether every row has had its EOS."""
        return not any(self._open)

    def push(self, ids: Any) -> np.ndarray:
        """Take some ids and return the codes of the frames that are complete.

        Args:
            ids: integers ``[T]`` (layout ``delay``: ``[2, T]``), any T.

        Returns:
            Codes int64 ``[2, F]``; F may be 0.

        Raises:
            TokensError: an id stands where the layout has no place for it.  Those before it are taken: :meth:`flush`
                returns their codes.
        """
        ids, rows = np.asarray(ids), self.vocabulary.rows
        if ids.ndim != rows or (rows > 1 and len(ids) != rows) or (ids.size and ids.dtype.kind not in "iu"):
            shape = "[2, tokens]" if rows > 1 else "[tokens]"
            raise TokensError(
                f"ids of the layout {self.vocabulary.layout!r} are integers {shape}, "
                f"seen {ids.dtype} {list(ids.shape)}; take the sequences of a batch one by one",
                self._taken[0],
            )
        for column in ids.reshape(rows, -1).T.tolist():
            for row, index in enumerate(column):
                self._take(row, index)
        semantic, acoustic = self._codes
        return self._hand_out(len(semantic) if self.vocabulary.layout == "semantic" else len(acoustic))

    def flush(self) -> np.ndarray:
        """Return the frames ``[2, F]`` that never became complete, their acoustic codes -1 (missing).

        After it the decoder stands where it began.
        """
        codes = self._hand_out(len(self._codes[0]))
        self._restart()
        return codes

    def allowed(self) -> list[np.ndarray]:
        """Return which ids may come next: per row a mask, bool ``[vocabulary.size]``."""
        masks = [np.zeros(self.vocabulary.size, bool) for _ in self._taken]
        for row, mask in enumerate(masks):
            for ids in self._next(row):
                mask[ids.start : ids.stop] = True
        return masks

    def expected(self, seen: str, remedy: str, row: int = 0) -> TokensError:
        """Return the error that says what was seen, and what was wanted, at the next token of a row."""
        position, vocabulary = self._taken[row], self.vocabulary
        wanted = " or ".join(
            vocabulary.describe(ids.start, row) + (f" to {len(ids) - 1} (id {ids.stop - 1})" if len(ids) > 1 else "")
            for ids in self._next(row)
        )
        where = f"token {position}" + (f" of row {row}" if vocabulary.rows > 1 else "")
        return TokensError(f"{where}: {seen}, wanted is {wanted}; {remedy}", position)

    def _take(self, row: int, index: int) -> None:
        allowed, vocabulary = self._next(row), self.vocabulary
        if not any(index in ids for ids in allowed):
            remedy = "cut the sequence here, or sample only ids that TokenDecoder.allowed() has"
            raise self.expected(f"seen {vocabulary.describe(index, row)}", remedy, row)
        self._taken[row] += 1
        if index == vocabulary.eos:
            self._open[row] = False
        elif row == 0 and index in vocabulary.semantic:
            self._codes[0].append(index - vocabulary.semantic.start)
        elif index in vocabulary.acoustic:
            self._codes[1].append(index - vocabulary.acoustic.start)

    def _next(self, row: int) -> tuple[range, ...]:
        """Return the ids that may come next in a row."""
        vocabulary, taken = self.vocabulary, self._taken[row]
        pad, bos, eos, tag = (
            range(index, index + 1) for index in (vocabulary.pad, vocabulary.bos, vocabulary.eos, vocabulary.rate_tag)
        )
        if not self._open[row]:
            return (pad,)
        if taken < HEADER:
            return ((bos, tag)[taken],)
        semantic, acoustic = (len(codes) + self._frames for codes in self._codes)
        match vocabulary.layout:
            case "sequential" if semantic > 0 and acoustic == 0:
                return vocabulary.semantic, vocabulary.acoustic
            case "flat" | "sequential" if acoustic < semantic:
                return (vocabulary.acoustic,)
            case "sequential" if acoustic > 0:
                return (eos,)
            case "delay" if row == 1 and taken < HEADER + vocabulary.delay:
                return (pad,)
            case "delay" if row == 1:
                return (vocabulary.acoustic,) if acoustic < semantic else (eos,)
        return vocabulary.semantic, eos

    def _hand_out(self, frames: int) -> np.ndarray:
        codes = np.full((2, frames), MISSING, np.int64)
        for row, stream in zip(codes, self._codes, strict=True):
            row[: len(stream)] = stream[:frames]
            del stream[:frames]
        self._frames += frames
        return codes
