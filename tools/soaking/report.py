"""Summarizes the rounds of a soak test as numbers, and as the list in docs/reliability.md."""

import collections
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def summarize(rounds: Sequence[Mapping[str, Any]], arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the summary of all rounds.

    Args:
      rounds: results of `runs.run_round`.
      arguments: command-line arguments of the soak test.
    """
    sessions = [session for result in rounds for run in result["runs"].values() for session in run["sittings"]]
    counts = collections.Counter(session["event"] for session in sessions)
    killed = [session for session in sessions if -9 in session["codes"]]
    # Exit code 75 means that the run was preempted and saved.
    stopped = [session["seconds_to_stop"] for session in sessions if session["codes"] == [75] * len(session["codes"])]
    differences = [result["runs"]["another"]["largest_loss_difference"] for result in rounds]
    return {
        "command": " ".join(["tools/soak.py", *arguments]),
        "cores": os.cpu_count(),
        "minutes": round(sum(result["seconds"] for result in rounds) / 60, 1),
        "rounds": len(rounds),
        "sittings": len(sessions),
        "steps_taken": sum(session["steps"] for session in sessions),
        "steps_kept": sum(run["steps"] for result in rounds for run in result["runs"].values()),
        "kills": len(killed),
        "kills_while_saving": sum(session["while_saving"] for session in killed),
        "sigterms": counts["sigterm"],
        "sigterms_saved": len(stopped),
        "slowest_seconds_to_stop": max(stopped, default=None),
        "restores": sum(session["from_step"] > 0 for session in sessions),
        "meshes": len({tuple(session["mesh"]) for session in sessions}),
        "of_two_processes": sum(session["processes"] == 2 for session in sessions),
        "full_disks": counts["disk"],
        "saves_that_failed": sum(session["saves_failed"] for session in sessions),
        "damaged": sum(bool(session["damaged"]) for session in sessions),
        "passed_over": sum(session["passed_over"] for session in sessions),
        "refused_examples": sum(result["refused"] for result in rounds),
        "largest_loss_difference_on_other_meshes": max(differences, default=None),
        "surprises": [surprise for result in rounds for surprise in result["surprises"]],
        "lost": [lost for result in rounds for lost in result["lost"]],
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """Returns the summary as a Markdown list."""
    s = summary
    lost = f"{len(s['lost'])} things were lost" if s["lost"] else "nothing was lost"
    # These two claims hold only if nothing was lost.
    newest, same = ("", "") if s["lost"] else (", always from the newest complete step", ", the same ones in all runs")
    slowest = s["slowest_seconds_to_stop"]
    lines = [
        f"`{s['command']}` on {s['cores']} cores, {s['minutes']} minutes: {lost}.",
        "",
        f"- rounds of three runs: {s['rounds']}; {s['steps_kept']:,} steps in the finished runs, {s['steps_taken']:,} "
        f"steps taken, in {s['sittings']} sessions on {s['meshes']} meshes ({s['of_two_processes']} of two processes)",
        f"- `kill -9`: {s['kills']} ({s['kills_while_saving']} while a checkpoint was being written); SIGTERM: "
        f"{s['sigterms']}, of which {s['sigterms_saved']} arrived during training and were saved within "
        f"{'-' if slowest is None else f'{slowest:.1f}'} s",
        f"- {s['restores']} restores{newest}; the newest checkpoint was damaged {s['damaged']} times before, and a "
        f"damaged or unfinished step was skipped {s['passed_over']} times",
        f"- the disk was full {s['full_disks']} times, which made {s['saves_that_failed']} saves fail",
        f"- {s['refused_examples']} damaged examples were refused{same}",
        f"- losses on other meshes differ from those of the clean run by a relative difference of at most "
        f"{s['largest_loss_difference_on_other_meshes']:.2g}",
        *(f"- **lost**: {lost}" for lost in s["lost"]),
        *(f"- ended unexpectedly and was restarted: {surprise}" for surprise in s["surprises"]),
    ]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Writes a file atomically."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
