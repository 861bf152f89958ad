#!/usr/bin/env python3
"""Trains the nano model for as long as you like while everything goes wrong, and sees whether anything is lost.

    tools/soak.py --minutes 60 --out runs/soak        an hour; the report is runs/soak/report.json and report.md
    tools/soak.py --minutes 5 --seed 7                another, of one or two rounds

Needs nothing but CPU cores; as root, runs also lie on a disk of their own that is filled up now and then.

A round trains the same short run three times (two stages, AdamW then Muon, on documents of which some are damaged):

    clean      in peace, on a mesh drawn for the round
    same       on the same mesh, while it is killed (kill -9, SIGTERM) at random moments, its disk is filled, and the
               newest checkpoint is damaged (a byte flipped, a file cut or deleted) before it is started again
    another    likewise, but at every start on another mesh, now and then of two processes

Nothing is lost if every start goes on from the newest step that is whole; every step, however often it is taken, has
the batch that the clean run had, bit for bit, and refuses the same examples; `same` has the losses of the clean run, to
the last digit of its log, and ends in its weights and optimizer, bit for bit; and the losses of `another` are close.

The same command goes on where it was stopped, with the round that was being played.
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
    parser.add_argument("--minutes", type=float, default=60, help="rounds begin until then (60)")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="where everything goes (runs/soak)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (0)")
    parser.add_argument("--steps", type=int, default=30, help="of each run (30)")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    result = args.out / "report.json"
    rounds = json.loads(result.read_text(encoding="utf-8"))["rounds"] if result.exists() else []
    data = runs.draw_documents(args.out / "data")
    while sum(found["seconds"] for found in rounds) < 60 * args.minutes or not rounds:
        began, folder = time.monotonic(), args.out / f"round{len(rounds)}"
        shutil.rmtree(folder, ignore_errors=True)
        found = runs.play_round(folder, data, args.steps, random.Random(f"{args.seed} {len(rounds)}"))
        rounds.append(found | {"seconds": time.monotonic() - began})
        summary = report.summarise(rounds, sys.argv[1:])
        report.write(result, json.dumps({"summary": summary, "rounds": rounds}, indent=1) + "\n")
        report.write(args.out / "report.md", report.markdown(summary))
        if not found["lost"]:  # else it stays, to be looked at
            shutil.rmtree(folder)
    summary = report.summarise(rounds, sys.argv[1:])
    print(report.markdown(summary))
    return 1 if summary["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
