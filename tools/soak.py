#!/usr/bin/env python3
"""Soak test: trains the nano model under random failures for a given time, and checks that nothing is lost.

    tools/soak.py --minutes 60 --out runs/soak        an hour; the report is runs/soak/report.json and report.md
    tools/soak.py --minutes 5 --seed 7                a shorter one, of one or two rounds

It only needs CPU cores. As root, runs are also stored on a small file system of their own that is filled at times.

A round trains the same short run three times (two stages, AdamW then Muon, on documents of which some are damaged):

    clean      without failures, on a mesh drawn for the round
    same       on the same mesh. It is killed (kill -9, SIGTERM) at random moments, its disk is filled, and its newest
               checkpoint is damaged (a byte flipped, a file truncated or deleted) before it is started again
    another    the same failures, but on another mesh after every start, sometimes with two processes

Nothing is lost if all of this holds:

- Every start resumes from the newest complete step.
- Every step, however often it is taken, has bit for bit the batch of the clean run, and refuses the same examples.
- `same` logs the losses of the clean run to the last digit, and ends with bit for bit its weights and optimizer.
- The losses of `another` are close to those of the clean run.

The same command continues an interrupted test. It repeats the round that was interrupted.
"""

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path

from soaking import report, runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="start rounds for this long (default: 60)")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="output folder (default: runs/soak)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    parser.add_argument("--steps", type=int, default=30, help="steps of each run (default: 30)")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    report_file = args.out / "report.json"
    rounds = json.loads(report_file.read_text(encoding="utf-8"))["rounds"] if report_file.exists() else []
    data = runs.draw_documents(args.out / "data")
    while sum(result["seconds"] for result in rounds) < 60 * args.minutes or not rounds:
        start_time, folder = time.monotonic(), args.out / f"round{len(rounds)}"
        shutil.rmtree(folder, ignore_errors=True)
        result = runs.run_round(folder, data, args.steps, random.Random(f"{args.seed} {len(rounds)}"))
        rounds.append(result | {"seconds": time.monotonic() - start_time})
        summary = report.summarize(rounds, sys.argv[1:])
        report.write(report_file, json.dumps({"summary": summary, "rounds": rounds}, indent=1) + "\n")
        report.write(args.out / "report.md", report.markdown(summary))
        if not result["lost"]:  # Otherwise the folder is kept for inspection.
            shutil.rmtree(folder)
    summary = report.summarize(rounds, sys.argv[1:])
    print(report.markdown(summary))
    return 1 if summary["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
