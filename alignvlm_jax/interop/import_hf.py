"""Imports two Hugging Face folders as a checkpoint for inference, training and export.

    import_huggingface("siglip-so400m-patch14-384/", "Llama-3.2-1B-Instruct/", "runs/1b_start", dtype="bfloat16")

The shape of the model comes from the folders. Everything else in the checkpoint's config (tiling, packing, training
stages, compute precision) comes from a config file, by default from the shipped config of the same shape.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

from alignvlm_jax.backbones import backbone_folder
from alignvlm_jax.checkpoints.new_folder import new_folder
from alignvlm_jax.checkpoints.weights import fill_workdir
from alignvlm_jax.config.completion import Start, complete_config
from alignvlm_jax.config.experiment import BackbonesConfig, ExperimentConfig
from alignvlm_jax.config.geometry import check_same_model
from alignvlm_jax.config.loading import read_raw_config, shipped_configs
from alignvlm_jax.config.serialization import config_from_dict, config_to_dict
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.data.resampling import max_visual_tokens
from alignvlm_jax.downloads.hub_cache import model_name
from alignvlm_jax.downloads.sources import pinned
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop.assemble import assemble
from alignvlm_jax.interop.huggingface_config import read_language_config, read_vision_config
from alignvlm_jax.interop.start import load_config
from alignvlm_jax.interop.tokenizer import import_tokenizer
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import AlignVLMConfig, token_grid, tokens_per_tile
from alignvlm_jax.models.connectors import AlignConfig, connector_named
from alignvlm_jax.models.language import LanguageConfig
from alignvlm_jax.models.vision import VisionConfig
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh

# Source of the stages, tiling and packing of a model whose shape differs from all shipped configs.
_PAPER_CONFIG = "alignvlm_1b.py"
# Positions reserved for text when the number of tiles is limited by the decoder's context.
_TEXT_TOKENS = 256
_BIN_MULTIPLE = 512


@ordinary_modes()
def import_huggingface(
    vision: str | Path,
    language: str | Path,
    out: str | Path,
    *,
    connector: str | None = None,
    dtype: str = "float32",
    mesh: MeshConfig | None = None,
    config_file: str | Path | None = None,
    image_token: str | None = None,
    chat_template: str | None = None,
    max_tiles: int | None = None,
    log: Callable[[str], None] = print,
) -> ExperimentConfig:
    """Joins two backbones with a freshly initialized connector and writes the checkpoint.

    Args:
      vision: a SigLIP folder, a SigLIP on the Hub, or "nano".
      language: a Llama folder with its tokenizer, a Llama on the Hub, or "nano".
      out: workdir to create; it must be empty or not exist yet.
      connector: name of the connector; None uses the config's connector.
      dtype: dtype of the weights in the checkpoint.
      mesh: devices that hold the weights during the import; None is the first device.
      config_file: experiment config; None uses the shipped config of the same shape, or else the paper's stages.
      image_token: token that stands for an image; None finds or adds one.
      chat_template: text of a Jinja template that replaces the folder's.
      max_tiles: maximum number of tiles per page; None uses the config's, reduced if the context is too short.
      log: called with a sentence for each decision made during the import.

    Returns:
      The config in the checkpoint.

    Raises:
      UserError: if a folder, the tokenizer or the config is invalid or does not fit the others. Nothing is written
        then.
    """
    if connector is not None:
        connector_named(connector)  # Refuses an unknown name before anything is read.
    # Of a model on the Hub, the checkpoint records the commit.
    sources = {"vision": pinned(str(vision)), "language": pinned(str(language))}
    backbones, names = BackbonesConfig(**sources), {part: model_name(name) for part, name in sources.items()}
    # The configs and the tokenizer come first, because weights may take long to download.
    vision, language = (backbone_folder(part, name, with_weights=False) for part, name in sources.items())
    with new_folder(out) as folder:
        # The folders determine the shapes and the tokenizer.
        encoder, decoder = read_vision_config(vision), read_language_config(language)
        tokenizer = import_tokenizer(
            language, num_embeddings=decoder.vocab_size, image_token=image_token, chat_template=chat_template
        )
        for note in tokenizer.notes:
            log(note)
        # A config file determines everything else.
        if config_file:
            start = Start(
                ExperimentConfig(model=AlignVLMConfig(encoder, language=decoder)),
                dict(vision=str(vision), language=str(language)),
            )
            config = complete_config(read_raw_config(config_file), start)
        else:
            config = _shipped_config(encoder, decoder)
        if config is None:
            log(f"no shipped config has these shapes: stages as in {_PAPER_CONFIG}, bins for this model (see --config)")
            config = _paper_config(encoder, decoder, dtype)
        model = _adapt_model(config.model, decoder.vocab_size, tokenizer.num_embeddings, connector)
        config = dataclasses.replace(
            config,
            model=model,
            data=_adapt_data(config, model, max_tiles, log),
            backbones=backbones,
            init_from=None,
            tokenizer=None,
        )
        config = config_from_dict(config_to_dict(config))  # Validates it.
        # Build the weights on their devices and write the checkpoint.
        vision, language = (backbone_folder(part, name) for part, name in sources.items())
        devices = None if mesh is None else make_mesh(mesh)
        params = assemble(model, vision, language, mesh=devices, dtype=dtype, seed=config.seed, log=log)
        history = {"what": "imported", **names, "connector": f"fresh, seed {config.seed}", "dtype": dtype}
        fill_workdir(folder, config, params, tokenizer.chat, history=[history])
    return config


def _shipped_config(encoder: VisionConfig, decoder: LanguageConfig) -> ExperimentConfig | None:
    """Returns the first shipped config of these shapes, or None."""
    for file in shipped_configs():
        # A config may also be incomplete without its own arguments.
        with contextlib.suppress(UserError):
            config = load_config(file)
            check_same_model("config.model.vision", config.model.vision, encoder, "the folder of --vision")
            check_same_model("config.model.language", config.model.language, decoder, "the folder of --language")
            return config
    return None


def _paper_config(encoder: VisionConfig, decoder: LanguageConfig, dtype: str) -> ExperimentConfig:
    """Returns a config with these backbones and the paper's stages."""
    config = load_config(_PAPER_CONFIG)
    encoder, decoder = dataclasses.replace(encoder, dtype=dtype), dataclasses.replace(decoder, dtype=dtype)
    tiling = dataclasses.replace(config.data.tiling, tile_size=encoder.image_size)
    # Minimal bins; `_adapt_data` enlarges them to hold one page.
    packing = dataclasses.replace(config.data.packing, tokens_per_bin=1, tiles_per_bin=1)
    return dataclasses.replace(
        config,
        model=AlignVLMConfig(encoder, config.model.connector, decoder),
        data=dataclasses.replace(config.data, tiling=tiling, packing=packing),
    )


def _adapt_model(base: AlignVLMConfig, num_words: int, num_rows: int, connector: str | None) -> AlignVLMConfig:
    """Returns `base` with this connector and `num_rows` embedding rows, of which ALIGN uses the first `num_words`."""
    kind = connector_named(connector).config if connector else type(base.connector)
    settings = base.connector if isinstance(base.connector, kind) else kind()
    num_rows = max(num_rows, base.language.vocab_size)
    # Added rows (the image token, padding of the table) are not words, so ALIGN must not mix them into its output.
    if isinstance(settings, AlignConfig) and num_rows > num_words:
        settings = dataclasses.replace(settings, vocab_size=min(settings.vocab_size or num_words, num_words))
    language = dataclasses.replace(base.language, vocab_size=num_rows)
    return dataclasses.replace(base, connector=settings, language=language)


def _adapt_data(
    config: ExperimentConfig, model: AlignVLMConfig, max_tiles: int | None, log: Callable[[str], None]
) -> DataConfig:
    """Returns the data config with as many tiles per page as fit the context, and bins that hold a page."""
    tiling, packing = config.data.tiling, config.data.packing
    grid, positions = token_grid(model), model.language.max_position_embeddings
    requested = dataclasses.replace(tiling, max_tiles=max_tiles or tiling.max_tiles)
    # Reduce the number of tiles until the largest page and some text fit the decoder's context.
    tiling = requested
    while tiling.max_tiles > 1 and max_visual_tokens(tiling, grid) + _TEXT_TOKENS > positions:
        tiling = dataclasses.replace(tiling, max_tiles=tiling.max_tiles - 1)
    if max_visual_tokens(tiling, grid) + _TEXT_TOKENS > positions:
        raise UserError(
            f"a tile takes {tokens_per_tile(model)} positions, and the language model has {positions}: no room for "
            f"{_TEXT_TOKENS} of text. Use an encoder with fewer patches, or a language model with a longer context"
        )
    if tiling != requested:
        log(
            f"at most {tiling.max_tiles} tiles per page instead of {requested.max_tiles}: the context has {positions} "
            "positions"
        )
    tiles = tiling.max_tiles_per_image
    tokens = max_visual_tokens(tiling, grid) + max(stage.max_text_tokens for stage in config.stages)
    # A bin must hold the largest page with its text; enlarge bins that are too small.
    if packing.tiles_per_bin < tiles or packing.tokens_per_bin < tokens:
        tokens = -(-tokens // _BIN_MULTIPLE) * _BIN_MULTIPLE
        packing = dataclasses.replace(packing, tokens_per_bin=tokens, tiles_per_bin=tiles)
    return dataclasses.replace(config.data, tiling=tiling, packing=packing)
