"""Results in the forms that public leaderboards read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .results import Results

SUPERB_KINDS = {"speech": "Speech", "sound": "Audio", "music": "Music"}
SUPERB = {"pesq": "pesq_wb", "pesq-wb": "pesq_wb", "stoi": "stoi"}
"""Codec-SUPERB's name -> the metric here.  Its mel and STFT distances are over other bands and resolutions, its f0corr
is a correlation: nothing here is called so, since it would be ranked among what it cannot be compared with."""
VERSA = {
    "pesq": "pesq_wb",
    "stoi": "stoi",
    "estoi": "estoi",
    "visqol": "visqol",
    "wer": "wer",
    "spk_similarity": "speaker",
    "f0_error_cents": "f0",
    "f0_share": "f0_share",
    "log_mel_distance": "mel_l1",
    "multi_stft_distance": "stft",
    "log_spectral_distance": "lsd",
}
"""VERSA's name -> the metric here.  The last five are not VERSA's own; it takes a name with "error" or "distance" in it
for one of which less is better."""
PERCENT = {"wer"}
"""VERSA counts these as shares of 1."""
RESULT = "scores in the form of Codec-SUPERB's result files; its update_leaderboard.py shows absent metrics as 0"
ROW = "a row for Codec-SUPERB's page, web/src/results/data.js"
RECORDS = "for VERSA's reports"


def codec_superb(results: Results, system: str) -> dict[str, Any]:
    """Return one system in the form of Codec-SUPERB's result files and of its web page's rows.

    Args:
        results: of a run.
        system: name.

    Returns:
        ``results`` and ``row``, each as JSON.

    Source: voidful/Codec-SUPERB, ``results/codec-superb-tiny/*.json`` (system -> kind -> metric),
    ``scripts/update_leaderboard.py`` and ``web/src/results/data.js`` (bps in kbit/s, tps, ``speech_pesq`` ...).
    """
    scores: dict[str, dict[str, float]] = {}
    # There is no PESQ of sounds here, which Codec-SUPERB has; its overall PESQ is of speech and music.
    for kind, name in [*SUPERB_KINDS.items(), (None, "overall")]:
        found = {theirs: results.mean(system, ours, kind) for theirs, ours in SUPERB.items()}
        if any(found.values()):
            scores[name] = {theirs: value.mean for theirs, value in found.items() if value}
    kbps, facts = results.mean(system, "kbps_net"), results.systems[system]
    row: dict[str, Any] = {"bps": kbps and round(kbps.mean, 3)}
    if facts.get("tokens_per_second"):  # its tokens are frames, whatever each of them is made of
        row["tps"] = round(facts["tokens_per_second"] / len(facts["codebook_use"]), 2)
    for kind, values in scores.items():
        row |= {f"{kind.lower()}_{name}": round(values[name], 3) for name in ("pesq", "stoi") if name in values}
    return {"results": {system: scores}, "row": {system: row}}


def versa(results: Results, system: str) -> list[dict[str, Any]]:
    """Return one system as VERSA's per-utterance records: a key, and a number per metric.

    Args:
        results: of a run.
        system: name.

    Returns:
        One record per clip that has a value.

    Source: wavlab-speech/versa, ``versa/reporting.py`` (a JSON object per line), ``versa/result_summary.py`` and
    ``docs/supported_metrics.md``.
    """
    records = []
    for clip in results.clips:
        values = {theirs: results.scores(system, ours).get(clip) for theirs, ours in VERSA.items()}
        known = {name: value[0] / (100 if name in PERCENT else 1) for name, value in values.items() if value}
        if known:
            records.append({"key": clip.replace("/", "_"), **known})
    return records


def write_leaderboards(results: Results, folder: Path) -> tuple[dict[Path, str], list[str]]:
    """Write ``codec-superb/SYSTEM.json``, its row, and ``versa/SYSTEM.jsonl`` for every system that was measured.

    Args:
        results: of a run.
        folder: to write to.

    Returns:
        the files and what each is for, and the systems that were left out since there is nothing to rank them by.
    """
    written: dict[Path, str] = {}
    left_out = []
    for system, facts in results.systems.items():
        if not facts.get("measured", True):
            continue
        both, records = codec_superb(results, system), versa(results, system)
        if not records or both["row"][system]["bps"] is None:
            left_out.append(system)
            continue
        for path, use, text in (
            (folder / "codec-superb" / f"{system}.json", RESULT, json.dumps(both["results"], indent=4)),
            (folder / "codec-superb" / f"{system}.row.json", ROW, json.dumps(both["row"], indent=1)),
            (folder / "versa" / f"{system}.jsonl", RECORDS, "\n".join(map(json.dumps, records))),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
            written[path] = use
    return written, left_out
