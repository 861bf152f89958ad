"""ALIGN's attention over the vocabulary: checkpointed and streamed, it equals the dense form for all block sizes."""

import pytest
import torch

from alignvlm_jax.interop.pytorch import modeling_alignvlm as modeling

QUERIES, WORDS, WIDTH, OUT = 37, 203, 16, 24


def tensors(dtype=torch.float32, offset=0.0) -> dict[str, torch.Tensor]:
    """Returns inputs with peaked distributions. `offset` shifts all logits of a query, which LN_V must remove."""
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
    """Block sizes from many blocks with a remainder to a single block."""
    monkeypatch.setattr(modeling, "_MAX_LOGITS", request.param * 37)
    monkeypatch.setattr(modeling, "_MIN_WORDS", 7)
    monkeypatch.setattr(modeling, "_MAX_QUERIES", 16)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_the_streamed_form_equals_the_dense_form(small_blocks, offset):
    t = tensors(offset=offset)
    with torch.no_grad():
        found = modeling.expected_embedding(t["query"], words(t))
    assert (found - dense(t)).abs().max() < (1e-5 if offset == 0 else 2e-4)


def test_the_checkpointed_form_equals_the_dense_form_and_its_gradient(small_blocks):
    ours, theirs = tensors(), tensors()
    for t in (*ours.values(), *theirs.values()):
        t.requires_grad_(True)
    found, expected = modeling.expected_embedding(ours["query"], words(ours)), dense(theirs)
    assert (found - expected).abs().max() < 1e-5
    weights = torch.randn(QUERIES, OUT)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, t in ours.items():
        assert (t.grad - theirs[name].grad).norm() < 1e-5 * theirs[name].grad.norm(), name


def test_no_product_spans_all_queries_and_words(monkeypatch):
    monkeypatch.setattr(modeling, "_MAX_LOGITS", 20 * QUERIES)
    monkeypatch.setattr(modeling, "_MIN_WORDS", 1)
    largest = 0
    product = modeling.matmul_float32

    def record(left, right):
        nonlocal largest
        found = product(left, right)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr(modeling, "matmul_float32", record)
    t = tensors()
    with torch.no_grad():
        modeling.expected_embedding(t["query"], words(t))
    assert largest <= max(20 * QUERIES, QUERIES * OUT) < QUERIES * WORDS / 4
    largest = 0
    modeling.expected_embedding(t["query"].requires_grad_(), words(t)).sum().backward()
    assert largest < QUERIES * WORDS / 4


@pytest.mark.parametrize("training", [False, True])
def test_bfloat16_keeps_its_statistics_in_float32(training):
    """Logits are in the hundreds with a spread of some tens, where bfloat16 has steps of one or two."""
    t = tensors(torch.bfloat16, offset=10.0)
    with torch.set_grad_enabled(training):
        found = modeling.expected_embedding(t["query"], words(t))
    assert found.dtype == torch.bfloat16
    assert (found.double() - dense(t)).abs().max() < 2e-2


def test_autocast_is_bfloat16():
    """Under autocast, float32 weights give the same result as bfloat16 weights."""
    t = tensors(offset=10.0)
    narrow = {name: tensor if name in ("scale", "bias") else tensor.bfloat16() for name, tensor in t.items()}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = modeling.expected_embedding(t["query"], words(t))
    assert found.dtype == torch.bfloat16
    assert (found.double() - dense(narrow)).abs().max() < 2e-2


def test_the_product_for_gpus_has_the_right_gradient(monkeypatch):
    """cuBLAS computes a float32 product of bfloat16 factors; the test replaces it with a substitute."""
    monkeypatch.setattr(torch, "mm", lambda left, right, out_dtype: left.to(out_dtype) @ right.to(out_dtype))
    t = tensors(torch.bfloat16)
    left, right, weights = t["query"], t["keys"].T.contiguous(), torch.randn(QUERIES, WORDS)
    gradients = []
    for product in (modeling._Float32Product.apply, lambda left, right: left.float() @ right.float()):
        factors = left.clone().requires_grad_(), right.clone().requires_grad_()
        found = product(*factors)
        assert found.dtype == torch.float32
        (found * weights).sum().backward()
        gradients.append([factor.grad.float() for factor in factors])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()


def test_float64():
    t = {name: tensor.double() for name, tensor in tensors().items()}
    with torch.no_grad():
        streamed = modeling.expected_embedding(t["query"], words(t))
    assert streamed.dtype == torch.float64
    torch.testing.assert_close(streamed, dense(t))
    torch.testing.assert_close(modeling.expected_embedding(t["query"], words(t)), dense(t))


def test_distribution():
    t = tensors()
    p = modeling.word_distribution(t["query"], words(t))
    assert (p @ t["values"] - dense(t)).abs().max() < 1e-5
    assert torch.allclose(p.sum(-1), torch.ones(QUERIES))
