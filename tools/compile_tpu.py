"""Compiles the training or decoding step of a config for TPUs, on a machine without TPUs, and reports its cost.

    pip install "alignvlm-jax[tpu]"
    python tools/compile_tpu.py --config configs/alignvlm_8b.py --topology v5e:16x16 --stage 3
    python tools/compile_tpu.py --config configs/alignvlm_8b.py --topology v5e:16x16 --slices 2 --json 8b.json
    python tools/compile_tpu.py --config configs/alignvlm_1b.py --topology v5e:2x4 --decode
    python tools/compile_tpu.py --config configs/alignvlm_8b.py --topology v5e:16x16 --text-only --length 8192
    python tools/compile_tpu.py --config configs/alignvlm_8b.py --topology v5e:16x16 --stage 3 --search

Any key of the config can be set with --config.path.to.key=value. The reported memory is what the compiler allocates.
Collectives and FLOPs are counted in the compiled program; those in a loop count once per iteration. Step times are
estimates: one with each resource at its peak and everything overlapped, and one by the compiler's own schedule, which
is only meaningful at full effort (without --optimization-level O0). The counts assume that all bins are full of pages
of the largest size, and that a step has global_batch examples.

--search tries meshes, rows per device, recomputation and bins: first by arithmetic, then the most promising programs at
low effort, and the best of them at full effort. It prints step time against memory, and writes the best as overrides.
Finished programs are stored, so an interrupted search can be continued.

Exit codes: 0 if the program fits in memory; 2 for invalid arguments; 3 if it does not fit; 4 if it fits, but attention
fell back to the xla kernel.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# Must be set before JAX is imported. Nothing runs on a device, so libtpu must not search for chips.
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

from alignvlm_jax.config.loading import load_config
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import local_path
from alignvlm_jax.parallel.mesh import parse_mesh
from alignvlm_jax.parallel.topology import topology_devices
from alignvlm_jax.training import ahead_of_time
from tools import tpu_search

DOES_NOT_FIT, FELL_BACK = 3, 4


def main(argv: list[str] | None = None) -> int:
    args, overrides = _parse(argv)
    if args.optimization_level:
        jax.config.update("jax_optimization_level", args.optimization_level)
    try:
        experiment = load_config(args.config, overrides)
        if not 1 <= args.stage <= len(experiment.stages):
            raise UserError(f"--stage {args.stage}: {args.config} has stages 1 to {len(experiment.stages)}")
        devices = topology_devices(args.topology, slices=args.slices)
        if args.search:
            return tpu_search.run(args, overrides, experiment, devices)
        print(
            f"compiling for {len(devices)} devices of {args.topology}, which takes minutes", file=sys.stderr, flush=True
        )
        texts = []
        options = dict(rows_per_device=args.rows_per_device, write_text=texts.append)
        if args.decode:
            report = ahead_of_time.compile_decoding(experiment, devices, **options)
            reports = list(report.values())
        else:
            report = ahead_of_time.compile_train_step(
                experiment,
                devices,
                stage_index=args.stage - 1,
                slices=args.slices,
                text_length=args.length,
                **options,
            )
            reports = [report]
    except UserError as error:
        print(f"compile_tpu: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for entry in reports:
        print(describe(entry))
    if args.text:
        Path(args.text).write_text("\n".join(texts), encoding="utf-8")
    if args.json:
        request = {"config": args.config, "topology": args.topology, "slices": args.slices, "overrides": overrides}
        request["optimization_level"] = args.optimization_level
        Path(args.json).write_text(json.dumps({**request, **report}, indent=2) + "\n", encoding="utf-8")
    if not all(entry["fits"] for entry in reports):
        return DOES_NOT_FIT
    return FELL_BACK if any("xla" in entry["attention"].values() for entry in reports) else 0


def describe(report: ahead_of_time.Report) -> str:
    """Returns the report as text."""
    # The program and its memory.
    capacity, memory = report["capacity_bytes"], report["memory"]
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    lines = [
        f"{report['what']}, on {report['num_chips']} x {report['chip']}, mesh {mesh}"
        f" (compiled in {report['compile_seconds']:.0f} s)",
        "",
        "memory per chip" + ("" if report["fits"] else ": DOES NOT FIT"),
        *(f"  {name:<14}{size / 1e9:>9.2f} GB" for name, size in memory.items()),
        f"  {'total':<14}{sum(memory.values()) / 1e9:>9.2f} GB of {capacity / 1e9:.2f}",
    ]
    if report["failure"]:
        lines += ["  compiler error: " + report["failure"].splitlines()[0][:300]]
    # The size of a training step. Decoding has no bins.
    if "bins" in report:
        pages = (
            f"bins ({report['microbatches']} x {report['bins_per_microbatch']}) of {report['examples']} full pages"
            if report["tiles"]
            else "rows of text"
        )
        packing = f"  set --config.data.packing.bins_per_microbatch={report['bins_per_microbatch']}"
        parts = ", ".join(f"{part} {flops / 1e12:,.0f}" for part, flops in report["flops_by_part"].items())
        lines += [
            "",
            f"step: {report['bins']} {pages}: {report['tokens']:,} tokens, {report['tiles']:,} tiles",
            *([packing] if report["tiles"] else []),
            f"model TFLOP per step: {report['flops'] / 1e12:,.0f} ({parts})",
        ]
    ratio = (
        f", {report['executed_over_needed']:.2f} times its share of these" if "executed_over_needed" in report else ""
    )
    lines += [f"executed TFLOP per chip: {report['executed_flops_per_chip'] / 1e12:,.1f}{ratio}"]
    if "remat" in report:
        lines += [f"remat: encoder {report['remat']['encoder']}; decoder {report['remat']['decoder']}"]
    for trial in report.get("remat_trials", ()):
        size = "more than there is" if trial["num_bytes"] is None else f"{trial['num_bytes'] / 1e9:.2f} GB"
        outcome = "fits" if trial["fits"] else "does not fit" if trial["is_compiled"] else "at least; not compiled"
        lines.append(f"  tried {trial['remat']}: {size} ({outcome})")
    lines += ["", "collectives, GB sent per chip"]
    for kind, networks in report["collectives"].items():
        lines.append(f"  {kind:<20} ICI {networks['ici'] / 1e9:>9.2f}   DCN {networks['dcn'] / 1e9:>9.2f}")
    # Estimated times.
    kernels = ", ".join(f"{part} {kernel}" for part, kernel in report["attention"].items()) or "as compiled"
    estimate = report["estimate"]
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in estimate["seconds"].items())
    lines += [
        f"attention: {kernels}",
        "",
        f"ESTIMATE (nothing was run), each resource at its peak: {times}",
        f"  if everything overlaps: {_step(estimate, 'if_all_overlaps', 'model_flops_utilization')}",
    ]
    if "step_seconds_by_schedule" in estimate:
        times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in estimate["seconds_by_schedule"].items())
        step = _step(estimate, "by_schedule", "model_flops_utilization_by_schedule")
        lines += [f"  by the compiler's schedule: {step} ({times})"]
    # Advice for a program that does not fit.
    if not report["fits"]:
        lines += ["", "largest buffers"]
        lines += [f"  {b['bytes'] / 1e9:7.2f} GB  {b['shape']:<28} {b['from']}" for b in report["largest_buffers"]]
        lines += [
            "suggestions, most effective first",
            *(f"  - {advice}" for advice in report["advice"]),
        ]
    return "\n".join(lines) + "\n"


def _step(estimate: dict, time: str, utilization: str) -> str:
    """Returns one estimate of a step's time, with the utilization that follows from it in training."""
    cap = f", MFU at most {100 * estimate[utilization]:.0f} %" if utilization in estimate else ""
    return f"a step takes {estimate[f'step_seconds_{time}']:.2f} s{cap}"


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config", required=True, type=local_path, metavar="FILE", help="config file of the experiment"
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="KIND:SHAPE",
        help="TPU slice, such as v5e:16x16, v5p:4x4x4, v6e:8x8 or tpu7x:4x4x4",
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="number of slices, placed along data")
    parser.add_argument("--stage", type=int, default=1, metavar="I", help="number of the stage, from 1 (default: 1)")
    parser.add_argument(
        "--mesh",
        action="append",
        metavar="SIZES",
        help="mesh, such as data=1,fsdp=64,tensor=4 (default: the config's mesh); --search tries each that is given",
    )
    parser.add_argument(
        "--rows-per-device",
        type=int,
        default=1,
        metavar="N",
        help="bins per microbatch on each device of data x fsdp (default: 1)",
    )
    parser.add_argument("--decode", action="store_true", help="compile prefill and one decode step instead of training")
    parser.add_argument(
        "--text-only",
        action="store_true",
        help="compile the training step of the decoder alone, as of a language model: no images, and a target at every "
        "position of rows of --length tokens",
    )
    parser.add_argument("--length", type=int, metavar="L", help="tokens in a row of --text-only")
    parser.add_argument(
        "--optimization-level",
        choices=("O0", "O1", "O2", "O3"),
        help="effort of the compiler; O0 takes a fifth of the time but gives a worse schedule (default: the "
        "compiler's own level, as in a run)",
    )
    parser.add_argument("--json", type=local_path, metavar="FILE", help="write the report to this file")
    parser.add_argument(
        "--text",
        type=local_path,
        metavar="FILE",
        help="write the compiled program, as the compiler prints it, to a file",
    )
    tpu_search.add_options(parser)
    args, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if not (word.startswith("--config.") and "=" in word)]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.slices < 1 or args.rows_per_device < 1:
        parser.error("--slices and --rows-per-device: expected 1 or more")
    if args.text_only != (args.length is not None) or (args.text_only and (args.length < 1 or args.decode)):
        parser.error("--text-only: needs --length, 1 or more, and excludes --decode; --length: needs --text-only")
    overrides = [word.removeprefix("--config.") for word in rest]
    if args.search and (
        args.decode or args.text_only or args.json or args.optimization_level or args.rows_per_device != 1
    ):
        parser.error(
            "--search: takes no --decode, --text-only, --json, --optimization-level or --rows-per-device (use --rows)"
        )
    if args.mesh and not args.search:
        if len(args.mesh) > 1:
            parser.error("--mesh: expected one mesh, or --search")
        mesh = parse_mesh(args.mesh[0])
        overrides += [f"mesh.{axis}={getattr(mesh, axis)}" for axis in ("data", "fsdp", "tensor")]
    return args, overrides


if __name__ == "__main__":
    sys.exit(main())
