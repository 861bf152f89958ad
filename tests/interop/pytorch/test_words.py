"""ALIGN's attention over the vocabulary in PyTorch, streamed and checkpointed, against the dense form."""

import pytest
import torch

from alignvlm_jax.interop.pytorch import modeling_alignvlm as modeling

QUERIES, WORDS, WIDTH, OUT = 37, 203, 16, 24


def make_tensors(dtype=torch.float32, offset=0.0) -> dict[str, torch.Tensor]:
    """Returns inputs with peaked distributions; `offset` shifts all logits of a query, which LN_V must remove."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "query": normal(QUERIES, WIDTH).to(dtype),
        "keys": (normal(WORDS, WIDTH) + offset).to(dtype),
        "scale": (4 + normal(WORDS)).to(dtype),
        "bias": normal(WORDS).to(dtype),
        "values": normal(WORDS, OUT).to(dtype),
    }


def words(t) -> modeling.Words:
    """Returns the words that the tensors define, for the streamed form."""
    return modeling.Words(
        size=WORDS,
        keys=lambda block: t["keys"][block],
        norm=lambda block: (t["scale"][block], t["bias"][block]),
        values=lambda block: t["values"][block],
        eps=1e-5,
    )


def dense(t) -> torch.Tensor:
    """Computes the dense formula in float64."""
    t = {name: tensor.double() for name, tensor in t.items()}
    logits = t["query"] @ t["keys"].T
    logits = (logits - logits.mean(-1, keepdim=True)) / torch.sqrt(logits.var(-1, keepdim=True, correction=0) + 1e-5)
    return torch.softmax(logits * t["scale"] + t["bias"], -1) @ t["values"]


@pytest.fixture(params=[1, 300, 2**25])
def small_blocks(request, monkeypatch):
    """Sets block sizes, from many blocks with a remainder to a single block."""
    monkeypatch.setattr(modeling, "_MAX_LOGITS", request.param * 37)  # 37 queries
    monkeypatch.setattr(modeling, "_MIN_WORDS", 7)
    monkeypatch.setattr(modeling, "_MAX_QUERIES", 16)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_the_streamed_form_matches_the_dense_form(small_blocks, offset):
    t = make_tensors(offset=offset)
    with torch.no_grad():
        result = modeling.expected_embedding(t["query"], words(t))
    # Subtracting a large mean costs digits in float32.
    assert (result - dense(t)).abs().max() < (1e-5 if offset == 0 else 2e-4)


def test_the_checkpointed_form_matches_the_dense_form_and_its_gradient(small_blocks):
    ours, theirs = make_tensors(), make_tensors()
    for t in (*ours.values(), *theirs.values()):
        t.requires_grad_(True)
    result, expected = modeling.expected_embedding(ours["query"], words(ours)), dense(theirs)
    assert (result - expected).abs().max() < 1e-5
    weights = torch.randn(QUERIES, OUT)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, t in ours.items():
        assert (t.grad - theirs[name].grad).norm() < 1e-5 * theirs[name].grad.norm(), name


def test_no_product_spans_all_queries_and_words(monkeypatch):
    monkeypatch.setattr(modeling, "_MAX_LOGITS", 20 * QUERIES)
    monkeypatch.setattr(modeling, "_MIN_WORDS", 1)
    largest = 0
    product = modeling.matmul_float32

    def recording_product(left, right):
        nonlocal largest
        result = product(left, right)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(modeling, "matmul_float32", recording_product)
    t = make_tensors()
    with torch.no_grad():
        modeling.expected_embedding(t["query"], words(t))
    assert largest <= max(20 * QUERIES, QUERIES * OUT) < QUERIES * WORDS / 4
    largest = 0
    modeling.expected_embedding(t["query"].requires_grad_(), words(t)).sum().backward()
    assert largest < QUERIES * WORDS / 4


@pytest.mark.parametrize("training", [False, True])
def test_bfloat16_keeps_its_statistics_in_float32(training):
    """The logits are in the hundreds with a spread of some tens, where the steps of bfloat16 are one or two."""
    t = make_tensors(torch.bfloat16, offset=10.0)
    with torch.set_grad_enabled(training):
        result = modeling.expected_embedding(t["query"], words(t))
    assert result.dtype == torch.bfloat16
    assert (result.double() - dense(t)).abs().max() < 2e-2


def test_autocast_computes_in_bfloat16():
    """Under autocast, float32 weights give the same result as bfloat16 weights."""
    t = make_tensors(offset=10.0)
    narrow = {name: tensor if name in ("scale", "bias") else tensor.bfloat16() for name, tensor in t.items()}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        result = modeling.expected_embedding(t["query"], words(t))
    assert result.dtype == torch.bfloat16
    assert (result.double() - dense(narrow)).abs().max() < 2e-2


def test_the_product_for_gpus_has_the_right_gradient(monkeypatch):
    """On GPUs, cuBLAS computes a float32 product of bfloat16 factors. A substitute takes its place here."""
    monkeypatch.setattr(torch, "mm", lambda left, right, out_dtype: left.to(out_dtype) @ right.to(out_dtype))
    t = make_tensors(torch.bfloat16)
    left, right, weights = t["query"], t["keys"].T.contiguous(), torch.randn(QUERIES, WORDS)
    gradients = []
    for product in (modeling._Float32Product.apply, lambda left, right: left.float() @ right.float()):
        factors = left.clone().requires_grad_(), right.clone().requires_grad_()
        result = product(*factors)
        assert result.dtype == torch.float32
        (result * weights).sum().backward()
        gradients.append([factor.grad.float() for factor in factors])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()


def test_float64_matches_the_dense_form():
    t = {name: tensor.double() for name, tensor in make_tensors().items()}
    with torch.no_grad():
        streamed = modeling.expected_embedding(t["query"], words(t))
    assert streamed.dtype == torch.float64
    torch.testing.assert_close(streamed, dense(t))
    torch.testing.assert_close(modeling.expected_embedding(t["query"], words(t)), dense(t))


def test_the_distribution_sums_to_one_and_gives_the_dense_result():
    t = make_tensors()
    p = modeling.word_distribution(t["query"], words(t))
    assert (p @ t["values"] - dense(t)).abs().max() < 1e-5
    assert torch.allclose(p.sum(-1), torch.ones(QUERIES))
