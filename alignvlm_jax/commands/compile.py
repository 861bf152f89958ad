"""`alignvlm compile`: compiles the step of a config for TPUs that are not there."""

import argparse
import functools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from alignvlm_jax.commands.arguments import Commands, non_negative, positive
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import as_path, local_path, location
from alignvlm_jax.output_files import check_writable, write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence

    import jax

    from alignvlm_jax.config.experiment import ExperimentConfig

DESCRIPTION = """\
Compile the training or decoding step of a config for a TPU slice, on a machine without
TPUs, and report its memory, work and estimated time. This needs the extra `tpu`
(`pip install "alignvlm-jax[tpu]"`).

The reported memory is what the compiler allocates. Collectives and FLOPs are counted in
the compiled program; those in a loop count once per iteration. Step times are estimates:
one with each resource at its peak and everything overlapped, and one by the compiler's
own schedule, which is only meaningful at full effort (without --optimization-level O0).
The counts assume that all bins are full of pages of the largest size, and that a step has
global_batch examples.
"""

EPILOG = """\
examples:
  alignvlm compile --config configs/alignvlm_8b.py --topology v5e:16x16 --stage 3
  alignvlm compile --config configs/alignvlm_8b.py --topology v5e:16x16 --slices 2 --json 8b.json
  alignvlm compile --config configs/alignvlm_1b.py --topology v5e:2x4 --decode
  alignvlm compile --config configs/alignvlm_8b.py --topology v5e:16x16 --text-only --length 8192
  alignvlm compile --config configs/alignvlm_8b.py --topology v5e:16x16 --stage 3 --search
  alignvlm compile --config configs/alignvlm_1b.py --topology v5e:2x4 --stage 3 \\
      --config.data.group_questions=tree --questions 4

--config.path.to.key=value sets any field of the config.

--search tries meshes, rows per device, recomputation and bins: first by arithmetic, then
the most promising programs at low effort, and the best of them at full effort. It prints
step time against memory, and writes the best as overrides. Finished programs are stored,
so an interrupted search can be continued.

exit codes: 0 if the program fits in memory; 2 for invalid arguments; 3 if it does not fit;
4 if it fits, but attention fell back to the xla kernel.
"""

DOES_NOT_FIT, FELL_BACK = 3, 4


def add(commands: Commands) -> None:
    """Adds the command."""
    summary = "compile the step of a config for TPUs, without TPUs"
    command = commands.add("compile", run, summary, DESCRIPTION, EPILOG, takes_overrides=True)
    command.add_argument(
        "--config", required=True, type=local_path, metavar="FILE", help="config file of the experiment"
    )
    command.add_argument(
        "--topology",
        required=True,
        metavar="KIND:SHAPE",
        help="TPU slice, such as v5e:16x16, v5p:4x4x4, v6e:8x8 or tpu7x:4x4x4",
    )
    command.add_argument("--slices", type=positive, default=1, metavar="N", help="number of slices, placed along data")
    command.add_argument("--stage", type=int, default=1, metavar="I", help="number of the stage, from 1 (default: 1)")
    command.add_argument(
        "--mesh",
        action="append",
        metavar="SIZES",
        help="mesh, such as data=1,fsdp=64,tensor=4 (default: the config's mesh); --search tries each that is given",
    )
    command.add_argument(
        "--rows-per-device",
        type=positive,
        default=1,
        metavar="N",
        help="bins per microbatch on each device of data x fsdp (default: 1)",
    )
    command.add_argument(
        "--decode", action="store_true", help="compile prefill and one decode step instead of training"
    )
    command.add_argument(
        "--text-only",
        action="store_true",
        help="compile the training step of the decoder alone, as of a language model: no images, and a target at every "
        "position of rows of --length tokens",
    )
    command.add_argument("--length", type=positive, metavar="L", help="tokens in a row of --text-only")
    command.add_argument(
        "--questions",
        type=positive,
        metavar="N",
        help="questions about each page, as branches of its tree: needs config.data.group_questions=tree (default: 1)",
    )
    command.add_argument(
        "--optimization-level",
        choices=("O0", "O1", "O2", "O3"),
        help="effort of the compiler; O0 takes a fifth of the time but gives a worse schedule (default: the "
        "compiler's own level, as in a run)",
    )
    command.add_argument("--json", type=location, metavar="FILE", help="write the report to this file")
    command.add_argument(
        "--text",
        type=location,
        metavar="FILE",
        help="write the compiled program, as the compiler prints it, to a file",
    )
    _add_search(command)


def _add_search(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("search")
    group.add_argument("--search", action="store_true", help="find the fastest training step that fits")
    group.add_argument("--minutes", type=float, default=60, metavar="M", help="time limit of the search (default: 60)")
    group.add_argument(
        "--candidates",
        type=non_negative,
        default=12,
        metavar="N",
        help="programs to compile at low effort; 0 lists them (default: 12)",
    )
    group.add_argument(
        "--finalists", type=positive, default=2, metavar="N", help="programs at full effort (default: 2)"
    )
    group.add_argument("--jobs", type=positive, default=1, metavar="N", help="programs at the same time (default: 1)")
    group.add_argument(
        "--remat", action="append", metavar="NAMES", help="decoder's remat (default: each one that `auto` tries)"
    )
    group.add_argument(
        "--vision-remat", action="append", metavar="NAMES", help="encoder's remat (default: the config's)"
    )
    group.add_argument(
        "--rows", type=_numbers, default=(1, 2, 4), metavar="N,N", help="bins per device (default: 1,2,4)"
    )
    group.add_argument(
        "--pages", type=_numbers, default=(), metavar="N,N", help="pages per bin (default: the config's)"
    )
    group.add_argument(
        "--search-dir",
        type=as_path,
        default=Path("runs/compile_search"),
        metavar="DIR",
        help="stored reports (default: %(default)s)",
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive(word) for word in text.split(","))


def run(args: argparse.Namespace) -> int:
    """Compiles the step, or searches for the fastest one, and returns the exit code."""
    _check_options(args)
    # Nothing runs on a device, so libtpu must not search for chips. This has an effect only before JAX is imported.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from alignvlm_jax.interop.start import load_config
    from alignvlm_jax.parallel.mesh import parse_mesh
    from alignvlm_jax.parallel.topology import topology_devices

    overrides = list(args.overrides)
    if args.mesh and not args.search:
        mesh = parse_mesh(args.mesh[0])
        overrides += [f"mesh.{axis}={getattr(mesh, axis)}" for axis in ("data", "fsdp", "tensor")]
    experiment = load_config(args.config, overrides)
    if not 1 <= args.stage <= len(experiment.stages):
        raise UserError(f"--stage {args.stage}: {args.config} has stages 1 to {len(experiment.stages)}")
    if args.questions is not None and experiment.data.group_questions != "tree":
        raise UserError("--questions: needs trees, --config.data.group_questions=tree")
    devices = topology_devices(args.topology, slices=args.slices)
    if args.search:
        return _search(args, experiment, devices)
    if args.optimization_level:
        jax.config.update("jax_optimization_level", args.optimization_level)
    return _compile(args, overrides, experiment, devices)


def _check_options(args: argparse.Namespace) -> None:
    """Refuses options that do not belong together."""
    if args.text_only != (args.length is not None) or (args.text_only and args.decode):
        raise UserError("--text-only: needs --length and excludes --decode; --length: needs --text-only")
    excluded = args.decode or args.text_only or args.json or args.optimization_level or args.questions
    if args.search and (excluded or args.rows_per_device != 1):
        raise UserError(
            "--search: takes no --decode, --text-only, --json, --optimization-level, --questions or --rows-per-device "
            "(use --rows)"
        )
    if args.questions is not None and (args.decode or args.text_only):
        raise UserError("--questions: excludes --decode and --text-only")
    if args.mesh and len(args.mesh) > 1 and not args.search:
        raise UserError("--mesh: expected one mesh, or --search")


def _compile(
    args: argparse.Namespace,
    overrides: "Sequence[str]",
    experiment: "ExperimentConfig",
    devices: "Sequence[jax.Device]",
) -> int:
    """Compiles the step, prints and writes its report, and returns the exit code."""
    from alignvlm_jax.training import ahead_of_time
    from alignvlm_jax.training.compile_report import describe

    for file in filter(None, (args.json, args.text)):
        check_writable(file)
    print(f"compiling for {len(devices)} devices of {args.topology}, which takes minutes", file=sys.stderr, flush=True)
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
            questions=args.questions or 1,
            **options,
        )
        reports = [report]
    for entry in reports:
        print(describe(entry))
    if args.text:
        write_atomically(args.text, "\n".join(texts).encode())
    if args.json:
        request = {"config": args.config, "topology": args.topology, "slices": args.slices, "overrides": overrides}
        request["optimization_level"] = args.optimization_level
        write_atomically(args.json, (json.dumps({**request, **report}, indent=2) + "\n").encode())
    if not all(entry["fits"] for entry in reports):
        return DOES_NOT_FIT
    return FELL_BACK if any("xla" in entry["attention"].values() for entry in reports) else 0


def _search(args: argparse.Namespace, experiment: "ExperimentConfig", devices: "Sequence[jax.Device]") -> int:
    """Searches, prints the table and stores the best as overrides; returns the exit code."""
    from alignvlm_jax.training import compile_processes
    from alignvlm_jax.training.compile_candidates import candidates, lower_bound, rank, seconds_per_example
    from alignvlm_jax.training.compile_search import best, search, table

    space = compile_processes.make_space(experiment, devices, args.stage - 1, args.slices)
    found = candidates(
        space,
        policies=args.remat or compile_processes.REMAT,
        vision_policies=args.vision_remat,
        rows=args.rows,
        pages=args.pages,
        meshes=[_sizes(text, len(devices)) for text in args.mesh or ()] or None,
    )
    if not found:
        raise UserError("--search: no candidate divides the model, the bins and the devices evenly and may fit")
    ranked = rank(space, found)
    _log(f"{len(ranked)} candidates may fit")
    for candidate in ranked[: args.candidates or None]:
        seconds, bound = seconds_per_example(space, candidate), lower_bound(space, candidate) / 1e9
        _log(f"  at least {bound:5.2f} GB, about {1e3 * seconds:6.1f} ms a page  {candidate.describe()}")
    if not args.candidates:
        return 0

    common = ["--config", str(args.config), "--topology", args.topology, "--slices", str(args.slices)]
    common += ["--stage", str(args.stage), *(f"--config.{override}" for override in args.overrides)]
    identity = compile_processes.identity(experiment)
    outcomes = search(
        ranked,
        functools.partial(compile_processes.compile_program, common, args.search_dir, identity),
        minutes=args.minutes,
        num_candidates=args.candidates,
        num_finalists=args.finalists,
        jobs=args.jobs,
        log=_log,
    )
    print(table(outcomes))
    winner = best(outcomes)
    if winner is None:
        print("no program fits")
        return DOES_NOT_FIT
    lines = [f"--config.{override}" for override in winner.candidate.overrides()]
    file = args.search_dir / f"{Path(args.config).stem}-stage{args.stage}-{args.topology.replace(':', '-')}.overrides"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\nbest, at " + winner.effort + " effort:", *lines, sep="\n  ")
    print(f"written to {file}; use it as: alignvlm train --config {args.config} $(cat {file})")
    return 0


def _sizes(text: str, num_devices: int) -> tuple[int, int, int]:
    """Returns the sizes of a mesh for all devices."""
    from alignvlm_jax.parallel.mesh import parse_mesh

    mesh = parse_mesh(text)
    if mesh.data * mesh.fsdp * mesh.tensor != num_devices:
        raise UserError(f"--mesh {text}: the sizes must multiply to {num_devices}")
    return mesh.data, mesh.fsdp, mesh.tensor


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
