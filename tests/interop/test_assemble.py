"""Assembly of a model from two folders: sharding, W2 from the LM head, and rows for an image token."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignvlm_jax.errors import UserError
from alignvlm_jax.interop.assemble import abstract_parameters, assemble
from alignvlm_jax.interop.huggingface_config import read_language_config, read_vision_config
from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.models.connectors import AlignConfig, MLPConfig
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from tests.interop import oracle

CUBE = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def backbones(request, tmp_path_factory):
    """The folder of both backbones, the decoder in PyTorch, and the config of the assembled model."""
    folder = tmp_path_factory.mktemp("backbones")
    oracle.siglip(folder / "vision")
    llama = oracle.llama(folder / "language", tie_word_embeddings=request.param)
    config = AlignVLMConfig(
        read_vision_config(folder / "vision"),
        AlignConfig(),
        read_language_config(folder / "language"),
    )
    return folder, llama, config


def build(folder, config, **options):
    return assemble(config, folder / "vision", folder / "language", **options)


def with_rows(config, rows, words):
    """Returns the config with an embedding table of `rows` rows, of which ALIGN uses `words`."""
    language = dataclasses.replace(config.language, vocab_size=rows)
    return dataclasses.replace(config, language=language, connector=AlignConfig(vocab_size=words))


def test_w2_is_a_copy_of_the_lm_head(backbones):
    folder, llama, config = backbones
    params = build(folder, config)
    w2, head = params["connector"]["w2"], llama.lm_head.weight.detach().numpy()
    np.testing.assert_array_equal(w2, head)
    name = "embedding" if config.language.tie_word_embeddings else "lm_head"
    assert w2.unsafe_buffer_pointer() != params["language"][name].unsafe_buffer_pointer()
    np.testing.assert_array_equal(params["connector"]["vocab_norm_scale"], np.full(50, 2.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mesh_shards_the_same_values(backbones, dtype):
    folder, _, config = backbones
    config = with_rows(config, 64, 50)
    mesh = make_mesh(CUBE)
    single, sharded = build(folder, config, dtype=dtype), build(folder, config, dtype=dtype, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, sharded, single)
    expected = abstract_parameters(config, mesh=mesh, dtype=dtype)
    jax.tree.map(lambda leaf, shape: leaf.sharding == shape.sharding or pytest.fail(str(shape)), sharded, expected)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(sharded))
    # `expected` comes from the same rules as the result, so some specs are written out here.
    for path, spec in (
        (("language", "embedding"), P("tensor", "fsdp")),
        (("language", "layers", "mlp", "down", "kernel"), P(None, "tensor", "fsdp")),
        (("vision", "layers", "attention", "query", "kernel"), P(None, "fsdp", "tensor")),
        (("connector", "w2"), P("tensor", "fsdp")),
    ):
        leaf = sharded
        for name in path:
            leaf = leaf[name]
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), path
        assert leaf.addressable_shards[0].data.size == leaf.size // 4


def test_added_rows_are_the_mean_row_and_are_not_used_by_align(backbones):
    folder, llama, config = backbones
    params = build(folder, with_rows(config, 64, 50))
    tables = {"embedding": llama.model.embed_tokens, "lm_head": llama.lm_head}
    for name in {"embedding", "lm_head"} & set(params["language"]):
        old = tables[name].weight.detach().numpy()
        np.testing.assert_array_equal(params["language"][name][:50], old)
        np.testing.assert_allclose(params["language"][name][50:], np.tile(old.mean(0), (14, 1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(params["connector"]["w2"], llama.lm_head.weight.detach().numpy())
    for words in (None, 51):
        with pytest.raises(UserError, match=r"config\.model\.connector\.vocab_size: expected 50"):
            build(folder, with_rows(config, 64, words))


@pytest.mark.parametrize("backbones", [True], indirect=True)
def test_either_backbone_may_be_random(backbones):
    folder, llama, config = backbones
    complete = build(folder, config)
    half_random = assemble(config, None, folder / "language", seed=1)
    jax.tree.map(np.testing.assert_array_equal, half_random["language"], complete["language"])
    kernel = half_random["vision"]["patch_embedding"]["kernel"]
    assert kernel.shape == complete["vision"]["patch_embedding"]["kernel"].shape and float(kernel.std()) > 0
    all_random = assemble(config, None, None, mesh=make_mesh(CUBE), seed=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), all_random["vision"], half_random["vision"])
    head = all_random["language"]["embedding" if config.language.tie_word_embeddings else "lm_head"]
    np.testing.assert_array_equal(all_random["connector"]["w2"], head)
    assert not np.array_equal(head, llama.lm_head.weight.detach().numpy())


def test_a_model_with_another_connector_is_assembled(backbones):
    folder, _, config = backbones
    params = build(folder, dataclasses.replace(config, connector=MLPConfig()))
    assert set(params["connector"]) == {"linear_in", "linear_out"}


def test_problems_of_both_folders_are_reported_together(backbones, tmp_path):
    folder, _, config = backbones
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "config.json").write_text((folder / "vision" / "config.json").read_text())
    language = dataclasses.replace(config.language, num_layers=2)
    with pytest.raises(UserError) as error:
        assemble(dataclasses.replace(config, language=language), tmp_path / "vision", folder / "language")
    assert f"{tmp_path}/vision: no weights" in str(error.value)
    assert "config.model.language is not the model in" in str(error.value)
    assert "num_layers 2 (the folder says 3)" in str(error.value)
