"""Attributions of the trained nano model, compared with the effect of blanking patches."""

import numpy as np
import pytest

import alignvlm_jax
from alignvlm_jax.data.synthetic import draw_document
from alignvlm_jax.inspector import InspectConfig, attribution, inspect_image
from alignvlm_jax.inspector.words import patch_words

pytestmark = pytest.mark.large

PAGES, BLANKED = 8, 5


@pytest.fixture(scope="module")
def reader():
    return alignvlm_jax.load("nano")


def log_probability(reader, prompt, answer, visual) -> float:
    """Returns the log-probability of the answer, given these visual tokens instead of the page's."""
    batch = attribution._append_answer(reader.config, prompt, answer)
    arguments = (attribution.AlignVLM(reader.config), reader.generator.variables, batch, len(prompt.tokens), answer)
    return float(attribution._log_probs(*arguments, visual).sum())


def test_shares_predict_the_cost_of_blanking_patches(reader):
    """Blanking the patches with the largest shares costs far more than blanking random ones.

    The cost is the decrease of the answer's log-probability. For single patches, share and cost are correlated.
    """
    rng = np.random.default_rng(0)
    top_costs, random_costs, correlations, missing = [], [], [], []
    for index in range(PAGES):
        document = draw_document(0, "heldout", index)
        question = document.questions[0]
        config = InspectConfig(attribution="answer")
        inspection = inspect_image(reader, document.image, [question], config=config, progress=False)
        (answer,) = inspection.answers
        assert answer.text == reader.ask(document.image, question)
        (prompt,) = reader.prompts(document.image, [question])
        white = reader.prompts(document.image.point(lambda value: 255), [question])[0].tiles
        variables = reader.generator.variables
        blank = patch_words(reader.config, variables, white, prompt.tile_valid_hw, k=32, progress=False).visual
        visual, blank = (tokens.reshape(-1, tokens.shape[-1]) for tokens in (inspection.words.visual, blank))
        full = log_probability(reader, prompt, answer.ids, visual)
        assert full == pytest.approx(float(answer.attribution.log_probs.sum()), abs=1e-2)

        # Decrease of the log-probability if these patches have the visual tokens of a white page.
        def cost(patches, visual=visual, blank=blank, prompt=prompt, answer=answer, full=full):
            blanked = visual.copy()
            blanked[patches] = blank[patches]
            return full - log_probability(reader, prompt, answer.ids, blanked)

        shares = answer.attribution.shares.sum(axis=0)
        top_costs.append(cost(np.argsort(-shares)[:BLANKED]))
        random_costs.append(np.mean([cost(rng.permutation(len(shares))[:BLANKED]) for _ in range(5)]))
        costs = [cost([patch]) for patch in range(len(shares))]
        correlations.append(np.corrcoef(shares, costs)[0, 1])
        missing.append(answer.attribution.missing)
    print(
        f"\n{BLANKED} of 200 patches blanked: {np.mean(top_costs):.1f} nats by share, "
        f"{np.mean(random_costs):.2f} at random"
    )
    print(f"share against cost of a patch: correlation {np.mean(correlations):.2f}, {min(correlations):.2f} at least")
    print(f"shares miss {np.median(missing):.2%} of the rise (median), {max(missing):.2%} at most")
    assert np.mean(top_costs) > 5 and np.mean(top_costs) > 10 * np.mean(random_costs)
    assert np.mean(correlations) > 0.5 and np.median(missing) < 0.02
