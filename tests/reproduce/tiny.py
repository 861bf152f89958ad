"""A recipe that takes seconds: a tiny model on random backbones, two steps per stage, a few pages."""

import pathlib

import jax
from flax import linen as nn

from alignvlm_jax.config import load_config
from alignvlm_jax.data.synthetic.corpus import build_corpus
from alignvlm_jax.interop import huggingface
from alignvlm_jax.models.alignvlm import random_parameters
from alignvlm_jax.reproduce.options import Options
from alignvlm_jax.reproduce.parts import restoration
from tests.data.nano_tokenizer import write_chat_folder

SIZES = {"train": 40, "validation": 8, "heldout": 8}
STAGES = [f"stages.{stage}.{field}" for stage in (0, 1) for field in ("steps=2", "warmup_steps=0")]
MODEL = [
    "model.vision.patch_size=10",
    "model.vision.hidden_size=16",
    "model.vision.intermediate_size=16",
    "model.vision.num_layers=1",
    "model.vision.num_heads=2",
    "model.language.hidden_size=16",
    "model.language.intermediate_size=16",
    "model.language.num_layers=1",
    "model.language.num_heads=2",
    "model.language.num_kv_heads=1",
]


def make_options(folder: pathlib.Path, **changes) -> Options:
    """Returns options of the tiny recipe, and writes its backbones and data into `folder`, the output folder."""
    build_corpus(folder / "data" / "documents", seed=0, sizes=SIZES, progress=False)
    restoration.build(folder / "data", SIZES)
    overrides = (*MODEL, *STAGES, f"backbones.vision={folder / 'vision'}", f"backbones.language={folder / 'language'}")
    model = load_config("configs/reproduce.py", overrides).model
    params = nn.unbox(jax.jit(lambda rng: random_parameters(model, rng))(jax.random.key(0)))
    huggingface.save_vision_folder(folder / "vision", model.vision, params["vision"])
    huggingface.save_language_folder(folder / "language", model.language, params["language"])
    write_chat_folder(folder / "language")
    return Options(
        seeds=1,
        overrides=overrides,
        encoders=("patches",),
        questions=6,
        analysed=6,
        sizes=tuple(SIZES.items()),
        **{"connectors": ("align", "mlp"), "minutes": 20.0, **changes},
    )
