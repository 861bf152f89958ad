#!/usr/bin/env python3
"""Trains the nano model for as long as you like while everything goes wrong, and sees whether anything is lost.

    tools/soak.py --minutes 60 --out runs/soak        an hour; the report is runs/soak/report.json and report.md
    tools/soak.py --minutes 5 --seed 7                rounds go on being drawn until the time is up

Needs nothing but CPU cores; as root, runs also lie on a disk of their own that is filled up now and then.

A round trains the same short run three times (two stages, AdamW then Muon, on documents of which some are damaged):

    clean      in peace, on a mesh drawn for the round
    same       on the same mesh, while it is killed (kill -9, SIGTERM) at random moments, its disk is filled, and the
               newest checkpoint is damaged (a byte flipped, a file cut or deleted) before it is started again
    another    likewise, but at every start on another mesh, now and then of two processes

Nothing is lost if every start goes on from the newest step that is whole; every step, however often it is taken, has
the batch that the clean run had, bit for bit, and refuses the same examples; `same` takes the very losses of the clean
run and ends in its weights and optimizer, bit for bit; and the losses of `another` are close to them.
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
    parser.add_argument("--minutes", type=float, default=60, help="no round begins that would not end by then (60)")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="where everything goes (runs/soak)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (0)")
    parser.add_argument("--steps", type=int, default=30, help="of each run (30)")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    began, rng, rounds = time.monotonic(), random.Random(args.seed), []
    data = runs.draw_documents(args.out / "data")
    longest = 0.0
    while not rounds or time.monotonic() - began + longest < 60 * args.minutes:
        round_began = time.monotonic()
        folder = args.out / f"round{len(rounds)}"
        shutil.rmtree(folder, ignore_errors=True)
        found = runs.play_round(folder, data, args.steps, rng)
        rounds.append(found)
        longest = max(longest, time.monotonic() - round_began)
        summary = report.summarise(rounds, time.monotonic() - began, sys.argv[1:])
        report.write(args.out / "report.json", json.dumps({"summary": summary, "rounds": rounds}, indent=1) + "\n")
        report.write(args.out / "report.md", report.markdown(summary))
        if not found["failures"]:  # else it stays, to be looked at
            shutil.rmtree(folder)
    print(report.markdown(summary))
    return 1 if summary["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
