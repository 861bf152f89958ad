"""What a soak has come to: the figures of all rounds, and how they read in docs/reliability.md."""

import collections
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def summarise(rounds: Sequence[Mapping[str, Any]], arguments: Sequence[str]) -> dict[str, Any]:
    """Adds up what `runs.play_round` returned."""
    sittings = [sitting for found in rounds for run in found["runs"].values() for sitting in run["sittings"]]
    counts = collections.Counter(sitting["event"] for sitting in sittings)
    killed = [sitting for sitting in sittings if -9 in sitting["codes"]]
    stopped = [sitting["seconds_to_stop"] for sitting in sittings if sitting["codes"] == [75] * len(sitting["codes"])]
    differences = [found["runs"]["another"]["largest_loss_difference"] for found in rounds]
    return {
        "command": " ".join(["tools/soak.py", *arguments]),
        "cores": os.cpu_count(),
        "minutes": round(sum(found["seconds"] for found in rounds) / 60, 1),
        "rounds": len(rounds),
        "sittings": len(sittings),
        "steps_taken": sum(sitting["steps"] for sitting in sittings),
        "steps_kept": sum(run["steps"] for found in rounds for run in found["runs"].values()),
        "kills": len(killed),
        "kills_while_saving": sum(sitting["while_saving"] for sitting in killed),
        "sigterms": counts["sigterm"],
        "sigterms_saved": len(stopped),
        "slowest_seconds_to_stop": max(stopped, default=None),
        "restores": sum(sitting["from_step"] > 0 for sitting in sittings),
        "meshes": len({tuple(sitting["mesh"]) for sitting in sittings}),
        "of_two_processes": sum(sitting["processes"] == 2 for sitting in sittings),
        "full_disks": counts["disk"],
        "saves_that_failed": sum(sitting["saves_failed"] for sitting in sittings),
        "damaged": sum(bool(sitting["damaged"]) for sitting in sittings),
        "passed_over": sum(sitting["passed_over"] for sitting in sittings),
        "refused_examples": sum(found["refused"] for found in rounds),
        "largest_loss_difference_on_other_meshes": max(differences, default=None),
        "surprises": [surprise for found in rounds for surprise in found["surprises"]],
        "lost": [lost for found in rounds for lost in found["lost"]],
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary as a list."""
    s = summary
    lost = f"{len(s['lost'])} things were lost" if s["lost"] else "nothing was lost"
    whole, same = ("", "") if s["lost"] else (", every one from the newest whole step", ", the same ones by all runs")
    slowest = s["slowest_seconds_to_stop"]
    lines = [
        f"`{s['command']}` on {s['cores']} cores, {s['minutes']} minutes: {lost}.",
        "",
        f"- {s['rounds']} rounds of three runs, {s['steps_kept']:,} steps to the end of all runs, {s['steps_taken']:,} "
        f"taken, in {s['sittings']} sittings on {s['meshes']} meshes ({s['of_two_processes']} of two processes)",
        f"- {s['kills']} times `kill -9` ({s['kills_while_saving']} while a checkpoint was being written), "
        f"{s['sigterms']} SIGTERM, of which {s['sigterms_saved']} came in training and were saved within "
        f"{'-' if slowest is None else f'{slowest:.1f}'} s",
        f"- {s['restores']} restores{whole}; {s['damaged']} times that was damaged "
        f"first, and {s['passed_over']} times a damaged or unfinished step was passed over",
        f"- {s['full_disks']} times the disk was full, {s['saves_that_failed']} saves failed of it",
        f"- {s['refused_examples']} damaged examples were refused{same}",
        f"- losses on other meshes differ from the clean run's by at most "
        f"{s['largest_loss_difference_on_other_meshes']:.2g}, relatively",
        *(f"- **lost**: {lost}" for lost in s["lost"]),
        *(f"- ended by itself, and was started again: {surprise}" for surprise in s["surprises"]),
    ]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
