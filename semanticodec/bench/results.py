"""What a run found: per-clip values of every system, kept as JSON, JSONL and Parquet."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .statistics import Comparison, Interval, interval, paired

BITS = {"kbps_net": "net", "kbps_entropy": "entropy-coded", "kbps_file": "container", "kbps_gross": "gross"}
"""Measures of bits in kbit/s, weighted by the clip's length, and what the report calls them.

Beside these and the metrics there are encode_cpu, decode_cpu, encode_wall and decode_wall (seconds per second of sound,
weighted likewise), gain (dB that a decode was raised) and band (Hz up to which it has what its original has).
"""


@dataclass(frozen=True)
class Results:
    """Everything a run found.

    Args:
        title: what was run.
        machine: where, and from which commit.
        settings: what the values depend on beside systems and clips.
        clips: name -> kind, seconds, digest.
        systems: name -> family, what, rate, delay and further facts; ``delay_samples`` is None where it was not found.
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

    def scores(self, system: str, measure: str, kind: str | None = None) -> dict[str, tuple[float, float]]:
        """Return clip -> (value, weight), of one kind or of all."""
        found = self.values.get(system, {}).get(measure, {})
        return {
            clip: (value, weight)
            for clip, (value, weight) in found.items()
            if kind is None or self.clips[clip]["kind"] == kind
        }

    def mean(self, system: str, measure: str, kind: str | None = None) -> Interval | None:
        """Average a measure with its interval; None if no clip has it."""
        return interval(list(self.scores(system, measure, kind).values()))

    def compare(self, measure: str, kind: str | None = None) -> list[Comparison]:
        """Test all pairs of systems."""
        return paired(
            {name: {c: value for c, (value, _) in self.scores(name, measure, kind).items()} for name in self.systems}
        )

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
        """Write ``results.json``, and its rows as ``results.jsonl`` and ``results.parquet``."""
        import pyarrow
        import pyarrow.parquet

        folder.mkdir(parents=True, exist_ok=True)
        self.write(folder / "results.json")
        rows = list(self.rows())
        (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "results.parquet")

    def write(self, path: Path) -> None:
        """Write one JSON file, with a line per system and measure.

        A line has a value for each clip, in their order: null, a number, or number and weight if that is not 1.
        """

        def listed(found: Mapping[str, list[float]]) -> list[Any]:
            return [pair and (pair[0] if pair[1] == 1 else pair) for pair in map(found.get, self.clips)]

        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values = plain.pop("values")
        text = json.dumps(plain, indent=1)[:-2]
        lines = [
            f"  {json.dumps(system)}: {{\n"
            + ",\n".join(
                f"   {json.dumps(measure)}: {json.dumps(listed(clips))}" for measure, clips in measures.items()
            )
            + "\n  }"
            for system, measures in values.items()
        ]
        path.write_text(text + ',\n "values": {\n' + ",\n".join(lines) + "\n }\n}\n")


def read_results(path: Path) -> Results:
    """Read ``results.json``, or the one in a folder.

    Raises:
        ConfigError: it is not a file that :meth:`Results.write` wrote.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        plain = json.loads(file.read_text())
        for measures in plain["values"].values():
            for measure, line in measures.items():
                measures[measure] = {
                    clip: value if isinstance(value, list) else [value, 1.0]
                    for clip, value in zip(plain["clips"], line, strict=True)
                    if value is not None
                }
        return Results(**plain)
    except (ValueError, TypeError, LookupError) as error:
        raise ConfigError(f"{file} holds no results of semanticodec bench: {error}") from error
