"""Tests of the noise analysis: the noise is Gaussian, reaches the connector only, and does not depend on the batch."""

import functools
import itertools
import json

import jax
import numpy as np
import PIL.Image
import pytest

from alignvlm_jax.analysis.inputs import tile_batches
from alignvlm_jax.analysis.noise import measure, report, run
from alignvlm_jax.analysis.noise.corruptions import (
    CORRUPTIONS,
    DEFAULT_CORRUPTIONS,
    CorruptedRecords,
    Corruption,
    parse_corruptions,
)
from alignvlm_jax.analysis.noise.measure import NoisePoint, feature_distances, feature_noise, image_noise
from alignvlm_jax.data import images
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.report import Tally
from alignvlm_jax.models.alignvlm import AlignVLM
from alignvlm_jax.models.connectors import MLPConfig, PerceiverConfig
from tests.analysis.tiny import features_of, random_reader, records, report_of_ten

QUESTION = "What is the total?"


@pytest.fixture(scope="module")
def reader():
    return random_reader()


@pytest.fixture(scope="module")
def tiles(reader):
    return next(tile_batches(reader, records(), 6, title="tiles"))


def test_the_noise_is_gaussian_and_scales(reader, tiles):
    clean = features_of(reader, *tiles)
    by_sigma = {sigma: features_of(reader.with_feature_noise(sigma, 1), *tiles) - clean for sigma in (0.5, 3.0)}
    drawn = by_sigma[3.0] / 3.0
    assert abs(drawn.mean()) < 0.03 and abs(drawn.std() - 1) < 0.03
    assert np.mean(np.abs(drawn) < 1) == pytest.approx(0.683, abs=0.02)
    np.testing.assert_allclose(by_sigma[0.5] / 0.5, drawn, atol=1e-4)
    per_tile = drawn.reshape(len(drawn), -1)
    correlations = np.corrcoef(np.unique(per_tile.round(4), axis=0))
    assert len(correlations) > 8 and np.abs(correlations - np.eye(len(correlations))).max() < 0.4


def test_noise_of_a_tile_depends_on_its_pixels_and_the_seed_only(reader, tiles):
    def drawn(seed, order):
        noisy = features_of(reader.with_feature_noise(1.0, seed), tiles[0][:, order], tiles[1][:, order])
        return noisy - features_of(reader, tiles[0][:, order], tiles[1][:, order])

    order = np.arange(tiles[0].shape[1])
    np.testing.assert_allclose(drawn(0, order[::-1])[::-1], drawn(0, order), atol=1e-5)
    assert np.abs(drawn(1, order) - drawn(0, order)).mean() > 0.5


def test_answers_under_noise_do_not_depend_on_the_batch_and_leave_the_reader_unchanged(reader):
    pages = [images.open_image(record["image"]) for record in records()[:3]]
    before = reader.ask_batch(pages, [QUESTION] * 3, max_new_tokens=6)
    noisy = reader.with_feature_noise(3.0)
    together = noisy.ask_batch(pages, [QUESTION] * 3, max_new_tokens=6)
    assert together == [noisy.ask(page, QUESTION, max_new_tokens=6) for page in pages]
    assert together != before
    assert reader.ask_batch(pages, [QUESTION] * 3, max_new_tokens=6) == before
    assert reader.with_feature_noise(0.0).ask_batch(pages, [QUESTION] * 3, max_new_tokens=6) == before


@functools.partial(jax.jit, static_argnums=0)
def encode(model, variables, tiles, valid_hw):
    return model.apply(variables, tiles, valid_hw, method="encode_images")[0]


def distances_by_hand(reader, sigma, pages):
    """Computes distances, feature deviation and number of tokens in float64, batch by batch."""
    clean, noisy, features = [], [], []
    for tiles, valid_hw in tile_batches(reader, records(), pages, title="tiles"):
        is_real = valid_hw[0, :, 0] > 0
        features += [features_of(reader, tiles, valid_hw)[is_real].astype(np.float64)]
        for found, asked in ((clean, reader), (noisy, reader.with_feature_noise(sigma))):
            tokens = encode(AlignVLM(reader.config), asked.generator.variables, tiles, valid_hw)
            found += [np.asarray(tokens, np.float64).reshape(len(is_real), -1, tokens.shape[-1])[is_real]]
    clean, noisy = (np.concatenate(found).reshape(-1, clean[0].shape[-1]) for found in (clean, noisy))
    embedding = np.asarray(reader.generator.variables["params"]["language"]["embedding"], np.float64)
    distances = []
    for origin in (0.0, embedding.mean(0), clean.mean(0)):
        left, right = clean - origin, noisy - origin
        cosine = (left * right).sum(-1) / np.linalg.norm(left, axis=-1) / np.linalg.norm(right, axis=-1)
        distances.append((1 - cosine).mean())
    features = np.concatenate(features).reshape(-1, features[0].shape[-1])
    return distances, np.sqrt(features.var(0).mean()), len(clean)


@pytest.mark.parametrize("connector", ["align", "perceiver"])
def test_distances(reader, connector):
    if connector == "perceiver":
        reader = random_reader(PerceiverConfig(num_latents=3, depth=1, num_heads=2, num_kv_heads=1, head_dim=8))
    found = feature_distances(reader, records(), [0.0, 2.0], pages=5)
    np.testing.assert_allclose(found.by_sigma[0], 0, atol=1e-5)
    expected, deviation, num_tokens = distances_by_hand(reader, 2.0, 5)
    np.testing.assert_allclose(found.by_sigma[1], expected, rtol=1e-3, atol=1e-5)
    assert found.feature_deviation == pytest.approx(deviation, rel=1e-4)
    assert found.num_tokens == num_tokens


def test_points_are_scores_of_the_reader_under_each_sigma(reader, monkeypatch):
    asked = []

    def evaluate(reader, records, *, limit, title):
        asked.append((reader, limit))
        return report_of_ten(len(asked))

    monkeypatch.setattr(measure, "evaluate", evaluate)
    points = feature_noise(reader, records(), [0.0, 2.0], limit=7, seed=3, pages=2)
    assert [point.tally.right for point in points] == [1, 2] and [point.questions for point in points] == [10, 10]
    assert asked[0] == (reader, 7) and points[0].score == 0.1
    noise = asked[1][0].generator.variables["perturbation"]["features"]
    assert (float(noise.sigma), int(noise.seed)) == (2.0, 3)
    deviation = feature_distances(reader, records(), [0.0], pages=2).feature_deviation
    assert points[1].relative_sigma == pytest.approx(2 / deviation)


def test_a_page_is_always_corrupted_in_the_same_way():
    page = images.open_image(records()[0]["image"])
    for corruption in DEFAULT_CORRUPTIONS:
        corrupted = CorruptedRecords(records(), corruption, seed=0)
        once, twice = (images.open_image(corrupted[0]["image"]) for _ in range(2))
        assert once.size == page.size and once.tobytes() == twice.tobytes() != page.tobytes()
        assert {key: value for key, value in corrupted[0].items() if key != "image"} == {
            key: value for key, value in records()[0].items() if key != "image"
        }
    assert len(corrupted) == len(records())


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corruption_of_a_higher_level_is_worse(kind):
    """Levels are listed from mild to strong; the clean level changes almost nothing."""
    page = images.open_image(records()[0]["image"])
    original = np.asarray(page, float)

    def error(level):
        found = Corruption(kind, level).apply(page, np.random.default_rng(0))
        return np.abs(np.asarray(found, float) - original).mean()

    entry = CORRUPTIONS[kind]
    errors = [error(level) for level in entry.levels]
    assert errors == sorted(errors) and error(entry.clean) < 0.5 * errors[0]


def test_corners_of_a_rotated_page_are_white():
    white = PIL.Image.new("RGB", (60, 40), "white")
    turned = Corruption("rotation", 4.0).apply(white, np.random.default_rng(0))
    assert np.asarray(turned).min() == 255


def test_image_noise_scores_the_corrupted_pages(reader, monkeypatch):
    seen = []

    def evaluate(reader, records, *, limit, title):
        seen.append(images.open_image(records[0]["image"]).tobytes())
        return report_of_ten(len(seen))

    monkeypatch.setattr(measure, "evaluate", evaluate)
    corruptions = parse_corruptions(["blur=2", "none", "resolution=0.5"])
    points = image_noise(reader, records(), corruptions, limit=3)
    assert [(point.corruption.kind, point.tally.right) for point in points] == [("blur", 1), ("resolution", 2)]
    assert len({*seen, images.open_image(records()[0]["image"]).tobytes()}) == 3


@pytest.mark.parametrize(("text", "match"), [("fog", "blur, jpeg, rotation, resolution"), ("blur=much", "numbers")])
def test_unknown_corruptions_are_refused(text, match):
    with pytest.raises(UserError, match=match):
        parse_corruptions([text])


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("jpeg=500", "from 1 to 100, JPEG quality"),
        ("jpeg=20,0.9", "from 1 to 100"),
        ("resolution=0", "from 0.01 to 1, resolution kept"),
        ("resolution=0.5,2", "from 0.01 to 1"),
        ("blur=-1", "from 0 to 100, radius"),
        ("blur=inf", "from 0 to 100"),
        ("rotation=nan", "from 0 to 180, rotation"),
    ],
)
def test_levels_out_of_range_are_refused(text, valid):
    with pytest.raises(UserError, match=f"--corruptions {text}: expected numbers {valid}"):
        parse_corruptions([text])


def test_default_and_clean_levels_are_valid():
    for kind, entry in CORRUPTIONS.items():
        levels = [*entry.levels, entry.clean, *entry.valid]
        found = parse_corruptions([f"{kind}={','.join(map(str, levels))}"])
        assert [corruption.level for corruption in found] == levels


def test_files_are_written(reader, tmp_path, monkeypatch):
    readers = [("ALIGN", reader), ("MLP", random_reader(MLPConfig()))]
    rights = itertools.cycle((9, 7, 8, 8, 2, 5))
    monkeypatch.setattr(measure, "evaluate", lambda reader, records, *, limit, title: report_of_ten(next(rights)))
    monkeypatch.setattr(run.inputs, "load_readers", lambda checkpoints, batch_size: iter(readers))
    monkeypatch.setattr(run.inputs, "open_records", lambda data, split: records())
    run.run(["a", "b"], "data", tmp_path, limit=2, sigmas=[2.0], corruptions=(Corruption("blur", 1.0),))
    results = json.loads((tmp_path / "noise.json").read_text())
    assert [point["sigma"] for point in results["features"]["MLP"]] == [0.0, 2.0]
    assert results["images"]["ALIGN"][0]["level"] == 1.0
    for name in ("noise", "noise_images"):
        assert PIL.Image.open(tmp_path / f"{name}.png").width > 400
    text = (tmp_path / "noise.md").read_text()
    for name in ("ALIGN", "MLP"):
        shown = results["features"][name][1]["cosine_distance"]
        assert f"**{name}**" in text and f"{shown:.4f}" in text
    assert "from the smallest loss to the largest: ALIGN -20.0 points, MLP -60.0 points" in text
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"noise.json", "noise.md", "noise.png", "noise_images.png"}


def test_checkpoints_with_a_score_to_lose_are_ranked():
    def noise_report(*right):
        points = [
            NoisePoint(sigma, sigma / 1.1, Tally(count, 100), 0.0, 0.0, 0.0)
            for sigma, count in zip((0.0, 0.5, 1.0, 3.0), right, strict=True)
        ]
        return report.NoiseReport(points, [])

    text = report.describe({"ALIGN": noise_report(80, 76, 63, 3), "MLP": noise_report(73, 65, 47, 0)}, "heldout")
    assert "at sigma 1, from the smallest loss to the largest: ALIGN -17.0 points, MLP -26.0 points." in text
    assert "at sigma 3, from the smallest loss to the largest: MLP -73.0 points, ALIGN -77.0 points." in text
    text = report.describe({"ALIGN": noise_report(80, 76, 63, 3), "MLP": noise_report(0, 0, 0, 0)}, "heldout")
    assert "Side by side" not in text
