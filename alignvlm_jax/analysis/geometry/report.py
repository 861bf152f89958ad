"""JSON, plot and text of the geometry analysis."""

from collections.abc import Mapping
from typing import Any

import matplotlib.figure
import numpy as np

from alignvlm_jax.analysis import output
from alignvlm_jax.analysis.geometry.measure import TOLERANCE, Geometry


def to_json(geometry: Geometry) -> dict[str, Any]:
    """Returns the results of one checkpoint as JSON values; distances are in units of the text's spread."""

    def quartiles(distances):
        return [round(float(value), 6) for value in np.quantile(distances / geometry.spread, (0.25, 0.5, 0.75))]

    return {
        "tokens": len(geometry.nearest),
        "text_spread": round(geometry.spread, 6),
        "between_words": round(geometry.between_words / geometry.spread, 6),
        "nearest_word_quartiles": quartiles(geometry.nearest),
        "hull_tokens": len(geometry.hull.upper),
        "hull_distance_upper_quartiles": quartiles(geometry.hull.upper),
        "hull_distance_lower_quartiles": quartiles(geometry.hull.lower),
        "outside_hull": round(geometry.outside, 4),
        "inside_hull": round(geometry.inside, 4),
        "undecided": round(geometry.undecided, 4),
        "text_variance_in_plane": round(geometry.plane.explained[0], 4),
        "visual_variance_in_plane": round(geometry.plane.explained[1], 4),
    }


def plot(geometries: Mapping[str, Geometry]) -> matplotlib.figure.Figure:
    """Plots a plane for each checkpoint, and the distribution of the distances."""
    figure, panels = output.new_plot(len(geometries) + 1, title="Visual tokens among the text embeddings")
    # The last panel has the distances of all checkpoints.
    distances = panels[-1]
    for number, (name, geometry) in enumerate(geometries.items()):
        axes, plane = panels[number], geometry.plane
        text, visual = plane.text / geometry.spread, plane.visual / geometry.spread
        rings = {"s": 9, "marker": "o", "facecolors": "none", "edgecolors": "#999999", "linewidths": 0.6}
        axes.scatter(*text.T, **rings, label="text embeddings")
        axes.scatter(*visual.T, s=9, marker="x", color="#000000", linewidths=0.7, label=f"visual tokens, {name}")
        axes.set_xlabel("first principal axis (spreads of the text)")
        axes.set_ylabel("second principal axis (spreads of the text)")
        axes.legend(fontsize=8)
        # Thick lines are distances to the nearest word, thin ones to the hull. Markers would hide the steps.
        style = {key: value for key, value in output.line_style(number).items() if key in ("color", "linestyle")}
        for values, label, width in (
            (geometry.nearest, f"{name}, to the nearest word", 1.6),
            (geometry.hull.upper, f"{name}, to the hull", 0.8),
        ):
            ordered, shares = np.sort(values / geometry.spread), np.arange(1, len(values) + 1) / len(values)
            distances.step(ordered, 100 * shares, where="post", label=label, linewidth=width, **style)
    distances.set_xlabel("distance (spreads of the text)")
    distances.set_ylabel("visual tokens that are nearer (%)")
    distances.legend(fontsize=8)
    return figure


def describe(geometries: Mapping[str, Geometry], split: str) -> str:
    """Returns Markdown that states what the plot shows."""
    lines = ["# Geometry", "", "![](geometry.png)", ""]
    for name, geometry in geometries.items():
        hull = geometry.hull
        nearest, upper, lower = (
            np.median(values) / geometry.spread for values in (geometry.nearest, hull.upper, hull.lower)
        )
        lines += [
            f"**{name}**, {len(geometry.nearest):,} visual tokens of split {split!r}. Distances are in units of the "
            f"text embeddings' own spread. The median distance of a token to the nearest text embedding is "
            f"{nearest:.3f}; between a text embedding and the nearest other one it is "
            f"{geometry.between_words / geometry.spread:.3f}. Of {len(hull.upper)} tokens, "
            f"{100 * geometry.outside:.0f} % are outside the convex hull of the text embeddings, "
            f"each proven by a separating plane, and {100 * geometry.inside:.0f} % are a mixture of them, "
            f"to within {TOLERANCE:g}"
            + (f"; {100 * geometry.undecided:.0f} % are undecided" if geometry.undecided > 1e-9 else "")
            + f". The median distance to the hull is {lower:.3f} to {upper:.3f}. The plane shows "
            f"{100 * geometry.plane.explained[0]:.0f} % of the variance of the text embeddings and "
            f"{100 * geometry.plane.explained[1]:.0f} % of the variance of the visual tokens.",
            "",
        ]
    return "\n".join(lines)
