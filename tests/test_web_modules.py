"""The page's modules, called one by one in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chrome import MARKS, opened
from echo import BLOCK, Echo
from playwright.sync_api import Page

from benchmarks.page import launched
from semanticodec.wire.messages import Codes, decode

pytestmark = MARKS
RATE = 16000

EXAMPLE = re.compile(r"```example\n[A-Z].*\n((?:.*\n)*?)```")
HEX = re.compile(r"[0-9a-f]{2}(?: [0-9a-f]{2})*")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with Echo() as echo, launched() as browser, opened(browser, echo.url, microphone=False) as page:
        yield page


@pytest.fixture(scope="module")
def examples(root: Path) -> list[bytes]:
    """The messages that PROTOCOL.md shows byte by byte."""
    found = EXAMPLE.findall((root / "server" / "PROTOCOL.md").read_text())
    return [bytes.fromhex("".join(HEX.match(line)[0] for line in lines.splitlines())) for lines in found]  # type: ignore[index]


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, bytes | tuple) else value


def test_messages_are_those_of_the_specification(page: Page, examples: list[bytes]) -> None:
    assert len(examples) >= 15
    told = page.evaluate(
        """async (examples) => {
          const {decode, encode} = await import('/protocol.js');
          const plain = (value) => value instanceof Uint8Array ? Array.from(value) : value;
          return examples.map((bytes) => {
            const message = decode(Uint8Array.from(bytes));
            const fields = Object.entries(message).map(([name, value]) => [name, plain(value)]);
            const again = message.type === 'codes' ? null : Array.from(encode(message));
            return {fields: Object.fromEntries(fields), again};
          });
        }""",
        [list(example) for example in examples],
    )
    for example, seen in zip(examples, told, strict=True):
        message = decode(example)
        wanted = {name: plain(value) for name, value in asdict(message).items()}  # type: ignore[call-overload]
        assert seen["fields"] == {"type": type(message).__name__.lower(), **wanted}
        assert seen["again"] == (None if isinstance(message, Codes) else list(example))


def test_damaged_messages_are_refused(page: Page, examples: list[bytes]) -> None:
    refused, ignored, others = page.evaluate(
        """async (examples) => {
          const {decode} = await import('/protocol.js');
          const {WireError} = await import('/msgpack.js');
          let [state, refused, ignored] = [1, 0, 0];
          const others = [];
          const random = (n) => (state = (state * 48271) % 2147483647) % n;
          for (let i = 0; i < 20000; i++) {
            let bytes = Uint8Array.from(examples[random(examples.length)]);
            for (let k = random(4); k >= 0; k--) bytes[random(bytes.length)] = random(256);
            if (random(3) === 0) bytes = bytes.slice(0, random(bytes.length + 1));
            try {
              ignored += decode(bytes) === null;
            } catch (error) {
              if (error instanceof WireError) refused++;
              else others.push(String(error));
            }
          }
          return [refused, ignored, others.slice(0, 3)];
        }""",
        [list(example) for example in examples],
    )
    assert others == []
    assert refused > 10000
    assert ignored > 0


def test_codes_are_unpacked(page: Page) -> None:
    seen = page.evaluate(
        """async () => {
          const {Geometry, crc16, frameBytes} = await import('/protocol.js');
          const geometry = new Geometry({block: 5120, code_bits: [12, 13], rates: [25]});
          const data = [0x00, 0x10, 0x02, 0x00, 0x30, 0x04, 0x00, 0x28, 0x01, 0x80, 0x0e, 0x00, 0x80];
          const [{semantic, acoustic}] = geometry.unpack(Uint8Array.from(data), 25);
          const crc = crc16(new TextEncoder().encode('123456789'));
          const frames = [[64, false], [64, true], [416, true], [70000, false]].map((c) => frameBytes(...c));
          return [[...semantic], [...acoustic], crc, frames];
        }"""
    )
    assert seen == [[1, 2, 3, 4], [5, 6, 7, 8], 0x29B1, [66, 70, 424, 70010]]


@pytest.mark.parametrize(("source", "target"), [(48000, 16000), (44100, 16000), (16000, 44100), (16000, 16000)])
def test_resampling_keeps_time_and_shape(page: Page, source: int, target: int) -> None:
    out = page.evaluate(
        """async ([from, to]) => {
          const {Resampler} = await import('/resample.js');
          const resampler = new Resampler(from, to);
          const sine = Float32Array.from({length: from}, (_, i) => Math.sin(2 * Math.PI * 1000 * i / from));
          const out = [];
          for (let i = 0; i < sine.length; i += 128) out.push(...resampler.process(sine.subarray(i, i + 128)));
          return out;
        }""",
        [source, target],
    )
    wanted = np.sin(2 * np.pi * 1000 * np.arange(len(out)) / target)
    assert len(out) >= target * 0.99
    assert np.abs(np.array(out) - wanted)[200:].max() < 1e-3


PLAY = """async ({delays, chunk, seconds}) => {
  const {JitterBuffer} = await import('/jitter.js');
  const rate = 16000;
  const buffer = new JitterBuffer(rate);
  const tone = (n) => 0.5 * Math.sin(2 * Math.PI * 200 * n / rate);
  const arrivals = delays.map((delay, i) => ({at: i * chunk, now: (i + 1) * chunk / rate + delay}));
  arrivals.reduce((last, arrival) => (arrival.now = Math.max(last, arrival.now)), 0);
  const out = new Float32Array(32);
  // Per second: how far the sound lags, and the largest step from one sample to the next.
  const [delay, steps] = [Array(seconds).fill(0), Array(seconds).fill(0)];
  let last = 0;
  for (let n = 0; n < seconds * rate; n += 32) {
    while (arrivals.length && arrivals[0].now <= n / rate) {
      const {at, now} = arrivals.shift();
      buffer.push(Float32Array.from({length: chunk}, (_, i) => tone(at + i)), at, now);
    }
    const second = Math.floor(n / rate);
    delay[second] += (n / rate - buffer.at / rate) * 32 / rate;
    for (const sample of buffer.pull(out, n / rate)) {
      steps[second] = Math.max(steps[second], Math.abs(sample - last));
      last = sample;
    }
  }
  const {underruns, concealed, skipped} = buffer;
  return {delay, steps, underruns, concealed, skipped};
}"""


def play(page: Page, delays: list[float], seconds: int) -> dict[str, Any]:
    told: dict[str, Any] = page.evaluate(PLAY, {"delays": delays, "chunk": BLOCK, "seconds": seconds})
    return told


def test_even_arrivals_are_played_as_they_are(page: Page) -> None:
    told = play(page, [0.1] * 30, 9)
    assert told["underruns"] == 0
    # A block's time, its delay, and a margin.
    assert told["delay"][-1] == pytest.approx(0.42 + 0.03, abs=0.03)
    assert max(told["steps"][1:]) < 2 * np.pi * 200 / RATE * 0.5 * 1.1


def test_the_buffer_follows_jitter(page: Page) -> None:
    rng = np.random.default_rng(5)
    delays = [0.1] * 20 + list(0.1 + rng.uniform(0, 0.2, 60)) + [0.1] * 60
    told = play(page, delays, 44)
    assert told["delay"][5] == pytest.approx(0.45, abs=0.04)
    assert told["delay"][24] == pytest.approx(0.65, abs=0.06)
    assert told["delay"][-2] == pytest.approx(0.45, abs=0.04)
    assert told["underruns"] <= 4
    # Single periods are left out or repeated, where the wave continues.
    assert max(told["steps"]) < 0.2


def test_an_outage_is_concealed_and_then_skipped(page: Page) -> None:
    told = play(page, [0.1] * 20 + [2.0, 1.68, 1.36, 1.04, 0.72, 0.4] + [0.1] * 40, 20)
    assert told["underruns"] == 1
    assert told["concealed"] / RATE == pytest.approx(1.87, abs=0.2)
    assert told["delay"][-1] == pytest.approx(0.45, abs=0.04)
    assert max(told["steps"]) < 0.2


def test_a_longer_way_is_got_used_to(page: Page) -> None:
    told = play(page, [0.1] * 20 + [1.1] * 60, 26)
    assert told["delay"][-4:] == pytest.approx([1.45] * 4, abs=0.06)
    assert np.ptp(told["delay"][-4:]) < 0.02
