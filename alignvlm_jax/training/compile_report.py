"""The report of a compiled program as text: memory, work, collectives, estimated times, and advice."""

from alignvlm_jax.training.ahead_of_time import Report


def describe(report: Report) -> str:
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
        pages = "rows of text"
        if report["tiles"]:
            shape, questions = (
                f"{report['microbatches']} x {report['bins_per_microbatch']}",
                report["questions_per_page"],
            )
            pages = f"bins ({shape}) of {report['examples'] // questions} full pages"
        if report["branch_tokens_per_bin"] is not None:
            pages += f" with {questions} question{'s' * (questions > 1)} each as branches"
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
    if report.get("branch_tokens_per_bin") is not None and "executed_flops_per_example" in report:
        lines += [f"executed TFLOP per answer: {report['executed_flops_per_example'] / 1e12:,.2f}"]
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
