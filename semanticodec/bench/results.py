"""What a run found: per-clip values of every system, kept as JSON, JSONL and Parquet."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .metrics import METRICS
from .statistics import INTERVALS, METHOD, Comparison, Interval, interval, paired

BITS = {"kbps_net": "net", "kbps_entropy": "entropy-coded", "kbps_file": "container", "kbps_gross": "gross"}
"""Measures of bits in kbit/s, weighted by the clip's length, and what the report calls them.

Beside these and the metrics there are encode_cpu, decode_cpu, encode_wall and decode_wall (seconds per second of sound,
weighted likewise), late (samples of delay that were undone), gain (dB that a decode was raised) and band (Hz up to
which it has what its original has).
"""
ALL = "all"
"""What all kinds of sound together are called."""


@dataclass(frozen=True)
class Results:
    """Everything a run found.

    Args:
        title: what was run.
        machine: where, and from which commit.
        settings: what the values depend on beside systems and clips.
        clips: name -> kind, seconds, digest, group (of results before groups were kept: none, each is its own).
        systems: name -> family, what, rate, delay and further facts; ``delay_samples`` is the usual one, None
            where it was not found.
        values: system -> measure -> clip -> [value, weight].
        skipped: system or metric -> why it was left out.
        failed: "system on clip", or "system on clip: metric" -> what went wrong.
    """

    title: str
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    clips: Mapping[str, Mapping[str, Any]]
    systems: Mapping[str, Mapping[str, Any]]
    values: Mapping[str, Mapping[str, Mapping[str, list[float]]]]
    skipped: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """Kinds of sound that there are clips of, in the order of the clips."""
        return list(dict.fromkeys(clip["kind"] for clip in self.clips.values()))

    @functools.cached_property
    def groups(self) -> dict[str, str]:
        """Return clip -> what clips are alike with."""
        return {name: clip.get("group", name) for name, clip in self.clips.items()}

    def scores(self, system: str, measure: str, kind: str | None = None) -> dict[str, tuple[float, float]]:
        """Return clip -> (value, weight), of one kind or of all.

        Args:
            system: name.
            measure: name of a metric, or of bits or costs.
            kind: of sound; None for all.
        """
        found = self.values.get(system, {}).get(measure, {})
        return {
            clip: (value, weight)
            for clip, (value, weight) in found.items()
            if kind is None or self.clips[clip]["kind"] == kind
        }

    def late(self, system: str, clip: str) -> int:
        """Return by how many samples a decode was late, which was undone.

        Args:
            system: name.
            clip: name.

        Returns:
            Samples at 16 kHz, negative where it was early.
        """
        usual = self.systems[system].get("delay_samples") or 0
        return int(self.values.get(system, {}).get("late", {}).get(clip, [usual])[0])

    def mean(self, system: str, measure: str, kind: str | None = None) -> Interval | None:
        """Average a measure with its interval; None if no clip has it.

        Args:
            system: name.
            measure: name of a metric, or of bits or costs.
            kind: of sound; None for all.
        """
        scores = self.scores(system, measure, kind)
        return interval(list(scores.values()), [self.groups[clip] for clip in scores])

    def compare(self, measure: str, kind: str | None = None) -> list[Comparison]:
        """Test all pairs of systems on the clips that both have, by :func:`.statistics.paired`.

        Args:
            measure: a metric or another measure.
            kind: of sound; None: all.

        Returns:
            of each pair with clips in common, the difference of the weighted means, in the measure's unit.
        """
        found = {name: self.scores(name, measure, kind) for name in self.systems}
        scores, weights = (
            {name: {clip: pair[part] for clip, pair in clips.items()} for name, clips in found.items()}
            for part in (0, 1)
        )
        return paired(scores, groups=self.groups, weights=weights)

    def tests(self) -> Iterator[tuple[str, str, list[Comparison]]]:
        """Yield every metric, kind of sound (or "all") and its pairs of systems that have clips in common."""
        for measure in METRICS:
            for kind in (ALL, *self.kinds):
                pairs = self.compare(measure, None if kind == ALL else kind)
                if pairs:
                    yield measure, kind, pairs

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one row per system, clip and measure."""
        for system, measures in self.values.items():
            for measure, clips in measures.items():
                for clip, (value, weight) in clips.items():
                    yield {
                        "system": system,
                        "family": self.systems[system]["family"],
                        "clip": clip,
                        "kind": self.clips[clip]["kind"],
                        "measure": measure,
                        "value": value,
                        "weight": weight,
                    }

    def save(self, folder: Path) -> None:
        """Write ``results.json``, and its rows as ``results.jsonl`` and ``results.parquet``.

        Args:
            folder: to write to; made if it is not there.
        """
        import pyarrow
        import pyarrow.parquet

        folder.mkdir(parents=True, exist_ok=True)
        self.write(folder / "results.json")
        rows = list(self.rows())
        (folder / "results.jsonl").write_text("".join(_json(row) + "\n" for row in rows))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "results.parquet")

    def write(self, path: Path) -> None:
        """Write one JSON file, with a line per system and measure, and one per metric and kind of sound for the tests.

        A line of values has one for each clip, in their order: null, a number, or number and weight if that is not 1.
        A line of tests has a row for each pair of systems; the last of its columns says why a pair was not tested.

        Args:
            path: of the file.
        """

        def listed(found: Mapping[str, list[float]]) -> list[Any]:
            return [pair and (pair[0] if pair[1] == 1 else pair) for pair in map(found.get, self.clips)]

        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values = plain.pop("values")
        text = _json(plain, indent=1)[:-2]
        columns = ("first", "second", "difference", "low", "high", "p", "p_holm", "clips", "not_tested")
        tests: dict[str, list[str]] = {}
        for measure, kind, pairs in self.tests():
            line = _json([_row(pair) for pair in pairs])
            tests.setdefault(measure, []).append(f"    {json.dumps(kind)}: {line}")
        tested = ",\n".join(
            f"   {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n   }" for name, rows in tests.items()
        )
        text += (
            f',\n "tests": {{\n  "method": {json.dumps(METHOD)},\n'
            f'  "intervals": {json.dumps(INTERVALS)},\n  "columns": {json.dumps(columns)},\n'
            f'  "pairs": {{\n{tested}\n  }}\n }}'
        )
        lines = [
            f"  {json.dumps(system)}: {{\n"
            + ",\n".join(f"   {json.dumps(measure)}: {_json(listed(clips))}" for measure, clips in measures.items())
            + "\n  }"
            for system, measures in values.items()
        ]
        path.write_text(text + ',\n "values": {\n' + ",\n".join(lines) + "\n }\n}\n")


_json = functools.partial(json.dumps, allow_nan=False)
"""JSON that every program reads: it knows no NaN."""


def _row(pair: Comparison) -> list[Any]:
    numbers = (pair.difference, pair.low, pair.high, pair.p, pair.p_holm)
    shown = [None if number is None else float(f"{number:.3g}") for number in numbers]
    return [pair.first, pair.second, *shown, pair.clips, "" if pair.p_holm is not None else pair.verdict]


def read_results(path: Path) -> Results:
    """Read ``results.json``, or the one in a folder.

    Args:
        path: the file, or the folder that holds it.

    Raises:
        ConfigError: it is not a file that :meth:`Results.write` wrote.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        plain = json.loads(file.read_text())
        plain.pop("tests", None)  # follow from the values
        for measures in plain["values"].values():
            for measure, line in measures.items():
                measures[measure] = {
                    clip: value if isinstance(value, list) else [value, 1.0]
                    for clip, value in zip(plain["clips"], line, strict=True)
                    if value is not None
                }
        return Results(**plain)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{file} holds no results of semanticodec bench: {error}") from error
