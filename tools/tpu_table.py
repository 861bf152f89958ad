"""Writes the table of docs/tpu.md: whether a config fits a TPU slice, one row per call of `alignvlm compile`.

    make test-tpu                          compile all missing rows (minutes each; 4 GB of memory)
    python tools/tpu_table.py --only 8b    only rows whose name contains "8b"
    python tools/tpu_table.py --redo       compile all rows again
    python tools/tpu_table.py --fast       compile with little effort; such rows have no cap by schedule
    python tools/tpu_table.py --list       print the commands

A finished row is stored as docs/tpu/NAME.json and is compiled again only if its command changes, so an interrupted
table can be continued. A program that does not fit is a valid row. A program that falls back to slower attention is an
error.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS_FOLDER, PAGE = ROOT / "docs" / "tpu", ROOT / "docs" / "tpu.md"
BEGIN, END = "<!-- table: tools/tpu_table.py -->", "<!-- end of table -->"


def _row(
    model: str, stage: int, topology: str, mesh: str, decoder: str = "full", encoder: str = "full", more: str = ""
) -> str:
    """Returns the arguments of `alignvlm compile` for a model, a slice, a mesh, and what decoder and encoder keep."""
    arguments = f"--config configs/alignvlm_{model}.py --topology {topology}{more} --stage {stage} --mesh {mesh}"
    for part, remat in (("language", decoder), ("vision", encoder)):
        arguments += "" if remat == "full" else f" --config.model.{part}.remat={remat}"
    return arguments


# Meshes and recomputation were found by `alignvlm compile --search` for 8B in stage 3.
ROWS = {
    "8b-stage1-v5e-16x16": _row("8b", 1, "v5e:16x16", "data=2,fsdp=64,tensor=2", "attention_out", "attention_out"),
    "8b-stage3-v5e-16x16": _row("8b", 3, "v5e:16x16", "data=2,fsdp=64,tensor=2", "attention_out,qkv"),
    "8b-stage1-v6e-8x8": _row("8b", 1, "v6e:8x8", "data=1,fsdp=64", "attention_out,qkv", "attention_out"),
    "8b-stage3-v6e-8x8": _row("8b", 3, "v6e:8x8", "data=1,fsdp=64", "attention_out,qkv"),
    "8b-stage1-2xv5e-16x16": _row("8b", 1, "v5e:16x16", "data=4,fsdp=64,tensor=2", more=" --slices 2"),
    "8b-stage3-2xv5e-16x16": _row("8b", 3, "v5e:16x16", "data=2,fsdp=64,tensor=4", more=" --slices 2"),
    "8b-stage1-v5p-4x4x4": _row("8b", 1, "v5p:4x4x4", "data=1,fsdp=64", "attention_out,dots", "attention_out,dots"),
    "8b-stage3-v5p-4x4x4": _row("8b", 3, "v5p:4x4x4", "data=1,fsdp=64", "attention_out,dots"),
    "1b-stage1-v5e-16x16": _row("1b", 1, "v5e:16x16", "data=4,fsdp=64", "attention_out,qkv", "attention_out,qkv"),
    "1b-stage1-v5e-2x2": _row("1b", 1, "v5e:2x2", "data=1,fsdp=4"),
    "3b-stage1-v5e-16x16": _row("3b", 1, "v5e:16x16", "data=4,fsdp=64", "attention_out", "attention_out"),
    "3b-stage1-v5e-2x4": _row("3b", 1, "v5e:2x4", "data=1,fsdp=8"),
    "1b-stage1-v5e-2x4": _row("1b", 1, "v5e:2x4", "data=1,fsdp=8"),
    "3b-stage1-v5e-4x4": _row("3b", 1, "v5e:4x4", "data=1,fsdp=8,tensor=2"),
}
FITS, DOES_NOT_FIT = 0, 3


def main() -> int:
    args = _parse()
    chosen = {name: arguments for name, arguments in ROWS.items() if args.only in name}
    if args.list:
        print("\n".join(f"alignvlm compile {arguments}" for arguments in chosen.values()))
        return 0
    ROWS_FOLDER.mkdir(parents=True, exist_ok=True)
    for index, (name, arguments) in enumerate(chosen.items()):
        if not args.redo and _read_row(name) is not None:
            continue
        print(f"[{index + 1}/{len(chosen)}] {name}", flush=True)
        _compile(name, arguments, is_fast=args.fast)
        _write_page()
    _write_page()
    return 0


def _compile(name: str, arguments: str, *, is_fast: bool) -> None:
    """Compiles a row in a separate process and stores it."""
    scratch = ROWS_FOLDER / f"{name}.part"
    command = [sys.executable, "-m", "alignvlm_jax", "compile", *shlex.split(arguments)]
    command += ["--optimization-level", "O0"] if is_fast else []
    # Write to a scratch file until the row is complete, because a file with the final name counts as finished.
    code = subprocess.run([*command, "--json", str(scratch)], cwd=ROOT, check=False).returncode
    if code not in (FITS, DOES_NOT_FIT):
        raise SystemExit(f"{name}: alignvlm compile failed with exit code {code}; the row was not stored")
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    row = json.loads(scratch.read_text(encoding="utf-8"))
    row |= {"arguments": arguments, "revision": revision.stdout.strip()}
    row.pop("failure")
    scratch.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    scratch.rename(ROWS_FOLDER / f"{name}.json")


def _read_row(name: str) -> dict | None:
    """Returns a finished row, or None if there is none or its command has changed."""
    file = ROWS_FOLDER / f"{name}.json"
    row = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return row if row.get("arguments") == ROWS[name] else None


def _is_fast(row: dict) -> bool:
    """Returns whether a row was compiled with little effort."""
    # Rows compiled with JAX 0.10 may have "effort" instead, a number from -1 to 1.
    return row.get("effort", 0) < 0 or row.get("optimization_level") == "O0"


def _write_page() -> None:
    """Replaces the table between the markers of the page with a table of all finished rows."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


def table() -> str:
    """Returns all finished rows as a Markdown table."""
    lines = [
        "| model, stage | chips | mesh | kept by decoder, encoder"
        " | GB per chip | fits | bins per step (K x B) | executed / needed FLOPs"
        " | MFU at most, by FLOPs | MFU at most, by schedule | step, s | ICI, GB | DCN, GB | attention | effort |"
        " compile time |",
        "|---" * 16 + "|",
    ]
    for name in ROWS:
        row = _read_row(name)
        if row is None:
            continue
        # The schedule of little effort is not one that a run would have, so it is left out.
        is_fast = _is_fast(row)
        # Collectives are summed over their kinds, per network.
        estimate, traffic = row["estimate"], row["collectives"].values()
        mesh = " ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
        ici, dcn = (sum(kind[network] for kind in traffic) / 1e9 for network in ("ici", "dcn"))
        total = f"{row['per_chip_bytes'] / 1e9:.1f}" if row["per_chip_bytes"] else "more"
        slices = f"{row['slices']} x " if row["slices"] > 1 else ""
        lines.append(
            f"| {name.split('-')[0].upper()}, {name.split('-')[1].removeprefix('stage')} "
            f"| {slices}{row['topology']} | {mesh} | {_kept(row)} "
            f"| {total} of {row['capacity_bytes'] / 1e9:.1f} | {'yes' if row['fits'] else '**no**'} "
            f"| {row['microbatches']} x {row['bins_per_microbatch']} "
            f"| {_number(row.get('executed_over_needed'), '.2f')} "
            f"| {_percent(estimate.get('model_flops_utilization'))} "
            f"| {'?' if is_fast else _percent(estimate.get('model_flops_utilization_by_schedule'))} "
            f"| {estimate['step_seconds_if_all_overlaps']:.1f} "
            f"to {'?' if is_fast else _number(estimate.get('step_seconds_by_schedule'), '.1f')} "
            f"| {ici:.0f} | {dcn:.1f} "
            f"| {' '.join(sorted(set(row['attention'].values())))} "
            f"| {'low' if is_fast else 'full'} | {row['compile_seconds']:.0f} s |"
        )
    return "\n".join(lines)


def _kept(row: dict) -> str:
    """Returns what the decoder and a trained encoder keep for the backward pass."""
    remat = row.get("remat", {"decoder": "full", "encoder": "full"})
    parts = [remat["decoder"], *([remat["encoder"]] if "vision" in row["trainable"] else [])]
    return "; ".join("-" if part == "full" else part.replace(",", ", ") for part in parts)


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.0f} %"


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name contains this")
    parser.add_argument("--redo", action="store_true", help="compile finished rows again")
    parser.add_argument("--fast", action="store_true", help="compile with little effort; see `alignvlm compile --help`")
    parser.add_argument("--list", action="store_true", help="print the commands and exit")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
