"""What the results of ``benchmarks.corpus`` say, in words: lines of a table of ``benchmarks.readme``."""

from typing import Any

PARTS = ("throughput", "overhead", "kills", "command-kills", "ray-kills", "memory", "long", "corrupt", "tiny")


def told(part: str, f: dict[str, Any]) -> tuple[str, str]:
    """Return what a part of ``benchmarks.corpus`` has measured, and what it saw."""
    match part:
        case "throughput":
            rate, (before, after) = f["pipeline_hours_per_hour"], f["bare_hours_per_hour"]
            return (
                f"{f['hours_of_sound']:.2f} h of FLAC at 16 kHz to shards of {f['model']}, {f['processes']} processes",
                f"{rate:.0f} h per hour, {f['pipeline_hours_per_hour_with_start']:.0f} with the start; the bare "
                f"encoder {before:.0f} before and {after:.0f} after it ({f['pipeline_over_bare']:.2f} of the mean, "
                f"{rate / max(before, after):.2f} of the better)",
            )
        case "overhead":
            rates = f["hours_per_core_hour"]
            seen = f"{rates['pipeline']:.0f} h per core-hour; the bare encoder {rates['bare']:.0f}"
            return "the same by processor time, in one process", f"{seen} ({f['pipeline_over_bare']:.2f})"
        case "kills":
            at = f["killed_while"]
            return (
                f"one process killed at {f['points']} random moments ({at['listing']} before the first shard, "
                f"{at['shards']} between and inside commits of shards, {at['finished']} after the end) and resumed",
                f"{f['byte_identical']} times the same bytes",
            )
        case "command-kills":
            late = f["finished_before_the_kill"]
            when = f"{f['points']} random moments ({late} after its end)"
            what = f"the whole command with its two workers killed at {when}, resumed"
            return what, f"{f['byte_identical']} times the same bytes"
        case "ray-kills":
            workers, nodes = f["workers_killed"], f["nodes_lost"]
            return (
                f"two Ray nodes, {f['inputs']} inputs, one of which kills every process that reads it; in each run a "
                f"worker killed ({workers} runs) or a node lost ({nodes} runs) at a random moment",
                f"the bytes of an undisturbed local run {f['workers_killed_byte_identical']} of {workers} and "
                f"{f['nodes_lost_byte_identical']} of {nodes} times; listed: {', '.join(f['failures'].values())}",
            )
        case "memory":
            means = ", ".join(f"{mean:.0f}" for mean in f["resident_mib_by_fifth"]["mean"])
            return (
                f"{f['hours']:.0f} h of sound, 0.2 s to {f['longest_seconds'] / 60:.0f} min each (filter bank and "
                "networks replaced by zeros)",
                f"resident memory by fifths of the run: {means} MiB on average, at most "
                f"{max(f['resident_mib_by_fifth']['max']):.0f}",
            )
        case "long":
            seen = f"{f['resident_mib_before']:.0f} MiB before, {f['resident_mib_peak']:.0f} MiB at most"
            return f"one file of {f['hours']:.0f} h (the same stand-in)", seen
        case "corrupt":
            seen = f"{f['good_tokenised']} tokenised, {f['bad_listed']} listed"
            return f"{f['good']} odd and {f['bad']} damaged files", seen
        case _:
            seen = f"{f['rows']} rows, {f['failures']} failed, {f['duplicate_ids']} doubled"
            return f"{f['files']} files of 0.1 s, everything real", f"{seen}; {f['files_per_second']:.0f} per second"
