"""Compares an exported folder in PyTorch with the checkpoint in JAX: the same page and question through both.

    comparison = verify_export("runs/demo/checkpoint", "alignvlm-nano")
    print(comparison.describe())

Axes: L positions of the prompt, A tokens of the answer, V vocabulary.

Both sides have the weights as exported (rounded, if `dtype` is bfloat16 or float16) and compute in float32,
so only the order of additions may differ. One side is loaded after the other: 4 bytes per weight, and up to 3 GB.
"""

import dataclasses
import functools
import gc
import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from alignvlm_jax.checkpoints.weights import ParameterReader, restore_params
from alignvlm_jax.data import images
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.synthetic.records import draw_records
from alignvlm_jax.downloads.bucket_copy import local_copy
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.generate import Prompt, pad_prompts
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.inference.vocabulary import Variables
from alignvlm_jax.locations import is_bucket, open_location
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, Batch

TOLERANCE = 1e-3
"""Largest difference of logits that counts as the same, divided by the largest logit.

It holds for weights of every dtype, because both sides compute in float32. Trained models differ by about 1e-6; two
tiles in the wrong order change the logits by 0.04 or more.
"""
QUESTION = "What is the total?"
_NEW_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Result:
    """Answer and logits of one side, JAX or PyTorch, for the page.

    Attributes:
      tokens: ids of the prompt.
      answer_ids: ids of the answer, decoded greedily.
      answer: its text.
      logits: scores of the tokens that follow the prompt and each token of the JAX answer.
      seconds: time for loading the model and answering.
    """

    tokens: Int32[np.ndarray, " L"]
    answer_ids: Int[np.ndarray, " A"]
    answer: str
    logits: Float32[np.ndarray, "A+1 V"]
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both results for one page.

    Attributes:
      question: question about the page.
      in_jax: result of the checkpoint.
      in_pytorch: result of the exported folder.
    """

    question: str
    in_jax: Result
    in_pytorch: Result

    @property
    def difference(self) -> float:
        """Largest difference of logits, divided by the largest logit of the checkpoint; NaN if any logit is NaN."""
        expected = self.in_jax.logits
        return float(np.abs(self.in_pytorch.logits - expected).max() / np.abs(expected).max())

    @property
    def problems(self) -> list[str]:
        """Differences, one sentence each; empty if the folder does the same as the checkpoint."""
        problems = []
        if not np.array_equal(self.in_jax.tokens, self.in_pytorch.tokens):
            problems.append("the prompts have different token ids")
        if self.in_jax.answer != self.in_pytorch.answer:
            problems.append("the answers differ")
        if not self.difference <= TOLERANCE:  # NaN, too
            problems.append("the logits differ by more than the tolerance")
        return problems

    def describe(self) -> str:
        """Returns the comparison as lines for the terminal."""
        lines = [
            f"question: {self.question}",
            f"JAX:      {self.in_jax.answer!r} ({self.in_jax.seconds:.1f} s)",
            f"PyTorch:  {self.in_pytorch.answer!r} ({self.in_pytorch.seconds:.1f} s)",
            f"largest difference of {' x '.join(map(str, self.in_jax.logits.shape))} logits: {self.difference:.1e} of "
            f"the largest logit (tolerance {TOLERANCE:.0e})",
        ]
        return "\n".join([*lines, "verified: the same" if not self.problems else "; ".join(self.problems)])


def check_packages() -> None:
    """Raises a `UserError` unless torch and transformers 5 are installed."""
    for package in ("torch", "transformers"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or (package == "transformers" and int(version.split(".")[0]) < 5):
            found = "which is not installed" if version is None else f"and this is {version}"
            needed = "transformers 5" if package == "transformers" else package
            raise UserError(f"verifying an export needs {needed}, {found}: pip install 'alignvlm-jax[torch]'")


def read_page(file: str | Path | None) -> tuple[bytes, str]:
    """Returns the encoded image of a page and a question about it; by default, a drawn page of the demo.

    Raises:
      UserError: if the file is not an image.
    """
    if file is None:
        (record,) = draw_records(0, "heldout", 0, 1)
        return record["image"], record["questions"][0]
    images.open_image(file)  # refuses what is not an image
    return open_location(file).read_bytes(), QUESTION


def verify_export(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    dtype: str | None = None,
    image: str | Path | None = None,
    on_side: Callable[[str], Any] | None = None,
) -> Comparison:
    """Answers a question about one page with a checkpoint in JAX and with its exported folder in PyTorch.

    Args:
      checkpoint: the checkpoint that was exported.
      folder: the folder that `export_alignvlm` wrote.
      dtype: dtype that the weights were exported in; None stands for the checkpoint's own.
      image: file of the page; None is a drawn page.
      on_side: function called with "JAX" and "PyTorch" when their turn begins.

    Raises:
      UserError: if torch or transformers is missing, or the image cannot be read.
    """
    check_packages()
    page, question = read_page(image)
    on_side = on_side or (lambda side: None)
    on_side("JAX")
    start = time.monotonic()
    in_jax = answer_in_jax(_load_in_float32(checkpoint, dtype), page, question)
    in_jax = dataclasses.replace(in_jax, seconds=time.monotonic() - start)
    # Free the weights before the other side loads its own.
    gc.collect()
    on_side("PyTorch")
    start = time.monotonic()
    in_pytorch = answer_in_pytorch(
        *_load_in_pytorch(local_copy(folder) if is_bucket(folder) else folder), page, question, in_jax.answer_ids
    )
    return Comparison(question, in_jax, dataclasses.replace(in_pytorch, seconds=time.monotonic() - start))


def answer_in_jax(reader: Reader, page: bytes, question: str) -> Result:
    """Returns the answer of a checkpoint to a question about a page, and its logits."""
    (prompt,) = reader.prompts(page, [question])
    # On accelerators, products of float32 matrices would be rounded.
    with jax.default_matmul_precision("float32"):
        (answer,) = reader.generator.generate([prompt], _NEW_TOKENS)
        logits = _answer_logits(reader, prompt, answer)
    return Result(prompt.tokens, answer, reader.tokenizer.decode(answer).strip(), logits)


def answer_in_pytorch(
    model: Any, processor: Any, page: bytes, question: str, answer_ids: Int[np.ndarray, " A"]
) -> Result:
    """Returns the answer of an exported model, and its logits after each of the tokens `answer_ids`."""
    import torch

    # The processor opens the file itself, as it does for users.
    with tempfile.NamedTemporaryFile() as file:
        file.write(page)
        file.flush()
        content = [{"type": "image", "path": file.name}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    ids = inputs["input_ids"]
    with torch.inference_mode():
        generated = model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        inputs["input_ids"] = torch.cat([ids, torch.tensor(np.asarray(answer_ids)[None], dtype=ids.dtype)], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = model(**inputs, logits_to_keep=len(answer_ids) + 1).logits[0]
    text = processor.decode(generated, skip_special_tokens=True).strip()
    return Result(ids[0].numpy().astype(np.int32), generated.numpy(), text, logits.float().numpy())


def _load_in_float32(checkpoint: str | Path, dtype: str | None) -> Reader:
    """Loads a checkpoint with its weights rounded to `dtype`, to be used in float32."""
    source = ParameterReader(checkpoint)
    leaves, structure = jax.tree.flatten(restore_params(checkpoint, dtype=dtype or "float32"))
    for i, leaf in enumerate(leaves):
        leaves[i] = leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    params = jax.tree.unflatten(structure, leaves)
    chat = ChatTokenizer.from_folder(source.tokenizer_folder)
    return Reader(_in_float32(source.config.model), params, chat, source.config.data.tiling, batch_size=1)


def _load_in_pytorch(folder: str | Path) -> tuple[Any, Any]:
    """Loads the model, in float32, and the processor of an exported folder."""
    import torch
    import transformers

    options = {"trust_remote_code": True}
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder, **options)


def _in_float32(config: AlignVLMConfig) -> AlignVLMConfig:
    """Returns the config of a model that computes in float32."""
    vision = dataclasses.replace(config.vision, dtype="float32")
    return dataclasses.replace(config, vision=vision, language=dataclasses.replace(config.language, dtype="float32"))


def _answer_logits(reader: Reader, prompt: Prompt, answer: Int[np.ndarray, " A"]) -> Float32[np.ndarray, "A+1 V"]:
    """Returns the logits at the prompt's last position and at each position of the answer."""
    number = len(answer)
    whole = dataclasses.replace(
        prompt,
        tokens=np.concatenate([prompt.tokens, answer]).astype(np.int32),
        visual_index=np.concatenate([prompt.visual_index, np.full(number, -1, np.int32)]),
    )
    side, pad_id = reader.config.vision.image_size, reader.tokenizer.pad_id
    batch = pad_prompts([whole], rows=1, tile_size=side, pad_id=pad_id)
    positions = np.arange(number + 1) + len(prompt.tokens) - 1
    return np.asarray(_score(AlignVLM(reader.config), reader.generator.variables, batch, positions), np.float32)


@functools.partial(jax.jit, static_argnames="model")
def _score(model: AlignVLM, variables: Variables, batch: Batch, positions: Int[Array, " P"]) -> Float[Array, "P V"]:
    def score(module: AlignVLM) -> Array:
        hidden, _ = module.read(batch)
        return module.language.logits(hidden[0, positions])

    return model.apply(variables, method=score)
