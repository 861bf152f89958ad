"""Tests of the geometry analysis: distances against non-negative least squares, bounds, and the files written."""

import json

import numpy as np
import PIL.Image
import pytest
import scipy.optimize

from alignvlm_jax.analysis.geometry import hull, run, words
from alignvlm_jax.analysis.geometry.hull import hull_distances
from alignvlm_jax.analysis.geometry.measure import measure_geometry, principal_plane
from alignvlm_jax.analysis.geometry.words import nearest_words
from alignvlm_jax.models.connectors import MLPConfig
from tests.analysis.tiny import random_reader, records

RNG = np.random.default_rng(0)


def distance_by_nnls(point, vertices):
    """Finds the best mixture by non-negative least squares; a row of large weight keeps the sum of weights at 1."""
    heavy = 1e5
    weights, _ = scipy.optimize.nnls(np.vstack([vertices.T, np.full(len(vertices), heavy)]), np.append(point, heavy))
    return np.linalg.norm(weights @ vertices / weights.sum() - point)


@pytest.mark.parametrize(("num_words", "width"), [(30, 3), (40, 12), (6, 20)])
def test_distances_to_the_hull(num_words, width):
    """Covers points far outside, on a face, at a vertex and inside."""
    text = RNG.normal(size=(num_words, width)) + 2
    mixtures = RNG.dirichlet(np.full(num_words, 0.2), 6) @ text
    points = np.concatenate([RNG.normal(size=(8, width)) * 3, text[:2], mixtures, text.mean(0, keepdims=True)])
    found = hull_distances(points, text)
    expected = np.array([distance_by_nnls(point, text) for point in points])
    np.testing.assert_allclose(found.upper, expected, atol=1e-5)
    np.testing.assert_allclose(found.lower, expected, atol=1e-5)
    assert (expected[:4] > 0.5).all() and (expected[8:] < 1e-5).all()
    assert (found.lower <= found.upper).all()


def test_bounds_hold_when_the_steps_run_out():
    text = RNG.normal(size=(60, 15))
    points = RNG.normal(size=(10, 15)) * 1.5
    exact = hull_distances(points, text).upper
    for steps in (1, 3, 6):
        found = hull_distances(points, text, max_steps=steps)
        assert (found.lower <= exact + 1e-9).all() and (exact <= found.upper + 1e-9).all()
    assert (found.upper - found.lower).max() > 1e-3, "six steps should not be enough for every point"


def test_duplicate_and_collinear_words():
    text = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    found = hull_distances(np.array([[1.2, 0.0], [1.5, 2.0], [3.0, 0.0]]), text)
    np.testing.assert_allclose(found.upper, [0, 2, 1], atol=1e-9)
    np.testing.assert_allclose(found.lower, [0, 2, 1], atol=1e-9)


def test_inverse_products_of_edges_are_kept_up_to_date():
    edges, inverse = RNG.normal(size=(7, 12)), np.zeros((0, 0))
    for number, edge in enumerate(edges):
        inverse = hull._with_edge(inverse, edges[:number], edge)
        np.testing.assert_allclose(
            inverse @ (edges[: number + 1] @ edges[: number + 1].T), np.eye(number + 1), atol=1e-9
        )
    assert hull._with_edge(inverse, edges, edges[2] - edges[5]) is None
    is_kept = np.array([True, False, True, True, False, True, False])
    found = hull._without_edges(inverse, is_kept)
    np.testing.assert_allclose(found @ (edges[is_kept] @ edges[is_kept].T), np.eye(4), atol=1e-9)


def test_least_squares_is_used_for_nearly_dependent_words_only(monkeypatch):
    """Least squares uses the threads of BLAS, which slow down problems as small as these several times."""
    flat, least_squares, calls = np.logspace(0, -8, 30), np.linalg.lstsq, []
    monkeypatch.setattr(hull.np.linalg, "lstsq", lambda *args, **kw: calls.append(1) or least_squares(*args, **kw))
    for scales, expected in ((np.ones(30), False), (flat, True)):
        text = RNG.normal(size=(200, 30)) * scales
        points = np.concatenate([RNG.dirichlet(np.full(200, 0.1), 8) @ text, RNG.normal(size=(8, 30)) + 1])
        found = hull_distances(points, text)
        assert bool(calls) == expected
        np.testing.assert_allclose(found.lower, found.upper, atol=1e-6)
        assert (found.upper[:8] < 1e-6).all() and (found.lower[8:] > 0.1).all()


def test_nearest_words(monkeypatch):
    monkeypatch.setattr(words, "_WORDS_PER_BLOCK", 7)
    text, points = RNG.normal(size=(30, 5)) + 10, RNG.normal(size=(12, 5)) + 10
    dense = np.linalg.norm(points[:, None] - text, axis=-1)
    found, indices = nearest_words(points, text)
    np.testing.assert_allclose(found, dense.min(1))
    np.testing.assert_array_equal(indices, dense.argmin(1))
    text[4] = text[9]
    between = np.linalg.norm(text[:, None] - text, axis=-1)
    between[between < 1e-9] = np.inf
    np.testing.assert_allclose(nearest_words(text, text, other=True)[0], between.min(1))


def test_the_plane_is_pca_of_both_groups_with_equal_weight(monkeypatch):
    monkeypatch.setattr(words, "_WORDS_PER_BLOCK", 11)
    text = RNG.normal(size=(40, 6)) * [5, 1, 1, 1, 1, 1] + 3
    visual = RNG.normal(size=(7, 6)) * [1, 1, 4, 1, 1, 1]
    plane = principal_plane(text, visual)
    origin = (text.mean(0) + visual.mean(0)) / 2
    weighted = np.concatenate([(text - origin) / np.sqrt(40), (visual - origin) / np.sqrt(7)])
    _, _, axes = np.linalg.svd(weighted, full_matrices=False)
    for found, group in ((plane.text, text), (plane.visual, visual)):
        expected = (group - origin) @ axes[:2].T
        np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-8)
    share = ((text - text.mean(0)) @ axes[:2].T).var(0).sum() / text.var(0).sum()
    assert plane.explained[0] == pytest.approx(share)


@pytest.fixture(scope="module")
def readers():
    return {"ALIGN": random_reader(), "MLP": random_reader(MLPConfig())}


def test_tokens_of_align_are_in_the_hull_and_those_of_a_random_mlp_are_not(readers):
    found = {
        name: measure_geometry(reader, records(), pages=2, tokens=40, hull_tokens=12)
        for name, reader in readers.items()
    }
    assert found["ALIGN"].inside == 1 and found["ALIGN"].outside == 0
    assert found["MLP"].outside == 1 and found["MLP"].inside == 0
    assert (found["MLP"].hull.upper < found["MLP"].nearest.max() + 1e-9).all()


def test_files_are_written(readers, tmp_path, monkeypatch):
    monkeypatch.setattr(run.inputs, "load_readers", lambda checkpoints: iter(readers.items()))
    monkeypatch.setattr(run.inputs, "open_records", lambda data, split: records())
    run.run(["a", "b"], "data", tmp_path, pages=2, tokens=30, hull_tokens=5)
    results = json.loads((tmp_path / "geometry.json").read_text())["geometry"]
    assert results["ALIGN"]["inside_hull"] == 1 and results["MLP"]["outside_hull"] == 1
    assert PIL.Image.open(tmp_path / "geometry.png").width > 1000
    text = (tmp_path / "geometry.md").read_text()
    assert "0 % are outside" in text and "100 % are outside" in text
    assert f"{results['MLP']['nearest_word_quartiles'][1]:.3f}" in text
