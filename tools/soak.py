#!/usr/bin/env python3
"""Soak test: trains the nano model under random failures for a given time, and checks that nothing is lost.

    tools/soak.py --minutes 60 --out runs/soak        an hour; the report is runs/soak/report.json and report.md
    tools/soak.py --minutes 5 --seed 7                a shorter test, of one or two rounds

It needs only CPU cores. As root, it stores each run with failures on a small file system, which it fills at times.

A round trains the same short run three times (two stages, AdamW then Muon, on documents some of which are damaged):

    clean      without failures, on a random mesh
    same       on the same mesh. It is killed (kill -9, SIGTERM) at random moments, its disk is filled, and its newest
               checkpoint is damaged (a byte flipped, a file truncated or deleted) before it is restarted
    another    with failures of the same kinds, but on a random mesh after every start, sometimes with two processes

Nothing is lost if all of this holds:

- Every start resumes from the newest undamaged step.
- Every step, however often it is repeated, has exactly the batch of the clean run and refuses the same examples.
- `same` logs the losses of the clean run to the last digit, and ends with bit-identical weights and optimizer state.
- The losses of `another` are close to the losses of the clean run.

The same command continues an interrupted test, and repeats the round that was interrupted.
"""

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path

from soaking import report, runs

from alignvlm_jax.locations import as_path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="start new rounds for this long (default: 60)")
    parser.add_argument("--out", type=as_path, default=Path("runs/soak"), help="output folder (default: runs/soak)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    parser.add_argument("--steps", type=int, default=30, help="steps of each run (default: 30)")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    report_file = args.out / "report.json"
    rounds = json.loads(report_file.read_text(encoding="utf-8"))["rounds"] if report_file.exists() else []
    data = runs.draw_documents(args.out / "data")
    while sum(result["seconds"] for result in rounds) < 60 * args.minutes or not rounds:
        # The random choices of a round depend only on the seed and on its number, so a round can be repeated.
        start_time, folder = time.monotonic(), args.out / f"round{len(rounds)}"
        shutil.rmtree(folder, ignore_errors=True)
        result = runs.run_round(folder, data, args.steps, random.Random(f"{args.seed} {len(rounds)}"))
        rounds.append(result | {"seconds": time.monotonic() - start_time})
        summary = report.summarize(rounds, sys.argv[1:])
        report.write(report_file, json.dumps({"summary": summary, "rounds": rounds}, indent=1) + "\n")
        report.write(args.out / "report.md", report.markdown(summary))
        if not result["lost"]:
            shutil.rmtree(folder)  # the folder of a failed round is kept for inspection
    summary = report.summarize(rounds, sys.argv[1:])
    print(report.markdown(summary))
    return 1 if summary["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
