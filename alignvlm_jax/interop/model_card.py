"""Writes the model card (`README.md`) of an exported folder, only from facts recorded in the checkpoint."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from alignvlm_jax.checkpoints.weights import ParameterReader
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_from_dict, config_to_dict
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import PARTS, tokens_per_tile
from alignvlm_jax.models.connectors import connector_named

_USAGE = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("THIS_FOLDER", trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "image", "url": "page.png"}, {"type": "text", "text": "Total?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""

_PLAIN_USAGE = {
    "language": """```python
from transformers import AutoTokenizer, LlamaForCausalLM

model, tokenizer = LlamaForCausalLM.from_pretrained("THIS_FOLDER"), AutoTokenizer.from_pretrained("THIS_FOLDER")
```""",
    "vision": """```python
from transformers import SiglipVisionModel

features = SiglipVisionModel.from_pretrained("THIS_FOLDER")(pixel_values).last_hidden_state
```""",
}


def model_card(
    reader: ParameterReader, *, dtype: str, part: Literal["alignvlm", "language", "vision"] = "alignvlm"
) -> str:
    """Returns the text of the model card.

    Args:
      reader: reader of the exported checkpoint.
      dtype: dtype of the exported weights.
      part: the complete model, or the backbone that was exported.
    """
    config = reader.config
    connector = config_to_dict(config)["model"]["connector"]["name"]
    title = {
        "alignvlm": f"AlignVLM ({connector})",
        "language": "The language model of an AlignVLM",
        "vision": "The vision encoder of an AlignVLM",
    }[part]
    sections = [
        _front_matter(part, connector),
        f"# {title}",
        _introduction(part),
        "## Use\n\n" + (_USAGE if part == "alignvlm" else _PLAIN_USAGE[part]),
        "## Model\n\n" + _model(reader, connector, dtype, part),
        "## Training\n\n" + _training(reader),
        "## Limits\n\n" + _limits(config, part),
        "## License\n\nThe checkpoint does not record a license. The licenses of the backbones named above apply to "
        "their weights and to weights derived from them; those of the training data may apply as well.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(part: str, connector: str) -> str:
    """Returns the YAML block that the Hugging Face Hub reads."""
    task = {"alignvlm": "image-text-to-text", "language": "text-generation", "vision": "image-feature-extraction"}[part]
    tags = ["alignvlm", *(["vision-language-model", "document-understanding", connector] if part == "alignvlm" else [])]
    lines = ["library_name: transformers", f"pipeline_tag: {task}", "license: unknown", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])


def _introduction(part: str) -> str:
    """Returns the introduction: what the folder holds, and what loads it."""
    if part == "alignvlm":
        return (
            "A vision-language model that answers questions about images of documents. It was trained in JAX with "
            "`alignvlm_jax` and exported for PyTorch. The code in this folder is all that transformers (5.0 or newer) "
            "needs. `alignvlm import --folder` of `alignvlm_jax` imports the folder without loss."
        )
    backbone = "decoder" if part == "language" else "encoder"
    return (
        f"The {backbone} of an AlignVLM, trained as a part of it with `alignvlm_jax`. transformers loads this folder "
        "without remote code."
    )


def _model(reader: ParameterReader, connector: str, dtype: str, part: str) -> str:
    """Returns the section about the architecture: a table of the parts, and the tiles and tokens of a page."""
    config = reader.config
    vision, language, tiling = config.model.vision, config.model.language, config.data.tiling
    counts = {name: _count(reader, name) for name in PARTS}
    fields = dataclasses.asdict(config.model.connector)
    settings = ", ".join(f"{name} {value}" for name, value in fields.items())
    # One row per part, with its parameters and its shape.
    rows = [
        (
            "vision",
            counts["vision"],
            f"SigLIP ViT, {vision.image_size} px tiles in patches of {vision.patch_size}, {vision.num_layers} layers, "
            f"width {vision.hidden_size}",
        ),
        ("connector", counts["connector"], f"`{connector}`{f' ({settings})' if settings else ''}"),
        (
            "language",
            counts["language"],
            f"Llama, {language.num_layers} layers, width {language.hidden_size}, vocabulary {language.vocab_size}, "
            f"{language.max_position_embeddings} positions",
        ),
    ]
    rows = [row for row in rows if part in ("alignvlm", row[0])]
    lines = ["| part | parameters | |", "|---|---|---|", *(f"| {a} | {b:,} | {c} |" for a, b, c in rows)]
    if part == "alignvlm":
        # A sentence about the connector, and one about the tiles and tokens of a page.
        has_thumbnail = tiling.thumbnail and tiling.max_tiles_per_image > 1
        joined = tiling.rule == "anyres_max_9"
        tiles = f"up to {tiling.grid_side**2 if joined else tiling.max_tiles} tiles of {tiling.tile_size} px (rule "
        tiles += f"`{tiling.rule}`, and the whole page as a thumbnail)" if has_thumbnail else f"`{tiling.rule}`)"
        tokens = f"each tile becomes {tokens_per_tile(config.model)} visual tokens"
        if joined:
            tokens += f", joined and reduced to about as many as {tiling.max_tiles} tiles have if there are more"
        lines += [
            f"| all | {sum(counts.values()):,} | |",
            "",
            f"The connector is {connector_named(connector).description}.",
            "",
            f"A page is cut into {tiles}; {tokens}.",
        ]
    lines += ["", f"Weights: {dtype}."]
    return "\n".join(lines)


def _count(reader: ParameterReader, part: str) -> int:
    """Returns the number of parameters of a part."""
    return sum(math.prod(shape) for path, shape in reader.shapes.items() if path.startswith(f"{part}/"))


def _training(reader: ParameterReader) -> str:
    """Returns the training history of the weights, followed by this checkpoint's own run."""
    passages = [_describe_event(event) for event in reader.history]
    if not reader.history:
        backbones = reader.config.backbones
        passages.append(
            f"Backbones: vision `{backbones.vision}`, language `{backbones.language}`"
            + (
                " (`nano`: the backbones shipped with `alignvlm_jax`)."
                if "nano" in dataclasses.astuple(backbones)
                else "."
            )
        )
    if reader.step:
        passages.append("Trained:\n\n" + _describe_run(reader.config, reader.meta["progress"]))
    # A pruned checkpoint has no steps either, but its history says that its weights were trained.
    elif getattr(reader.config.model.connector, "kept_words", None) is None:
        passages.append("Not trained any further: these are initial weights.")
    versions = ", ".join(f"{name} {version}" for name, version in reader.meta.get("versions", {}).items())
    return "\n\n".join([*passages, *([f"Saved by: {versions}."] if versions else [])])


def _describe_event(event: Mapping[str, Any]) -> str:
    """Returns the text of one entry of the history; past training runs are described like the last one."""
    if event.get("what") == "trained":
        try:
            config = config_from_dict(event["config"])
        except UserError:  # A config of an older version, with different keys.
            return f"Trained for {event['progress']['step']} steps."
        return "Trained:\n\n" + _describe_run(config, event["progress"])
    details = [f"- {name}: {_format_value(value)}" for name, value in event.items() if name != "what"]
    what = str(event.get("what", "step"))
    return "\n".join([f"{what[:1].upper()}{what[1:]}:", "", *details])


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_format_value(item)}" for name, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_format_value, value))
    return f"`{value}`"


def _describe_run(config: ExperimentConfig, progress: Mapping[str, Any]) -> str:
    """Returns a table of the stages of a run, with the number of completed steps."""
    lines = [
        "| stage | data | trained parts | steps done | examples per step | peak learning rates | optimizer |",
        "|---|---|---|---|---|---|---|",
    ]
    for index, stage in enumerate(config.stages):
        if index < progress["stage"]:
            done = _stage_length(stage)
        elif index == progress["stage"]:
            done = f"{progress['step_in_stage']} of {_stage_length(stage)}"
        else:
            done = f"0 of {_stage_length(stage)}"
        rates = ", ".join(f"{part} {getattr(stage.learning_rates, part):.2g}" for part in stage.trainable)
        optimizer = f"{stage.optimizer.name}, {stage.schedule}, {stage.warmup_steps} steps of warm-up"
        data = ", ".join(
            f"{part.dataset}/{part.split} ({part.task}{f', weight {part.weight:g}' if len(stage.mixture) > 1 else ''})"
            for part in stage.mixture
        )
        trained = ", ".join(stage.trainable)
        lines.append(f"| {stage.name} | {data} | {trained} | {done} | {stage.global_batch} | {rates} | {optimizer} |")
    lines += ["", f"Seed {config.seed}; {progress['step']} optimizer steps in total."]
    return "\n".join(lines)


def _stage_length(stage: StageConfig) -> str:
    return str(stage.steps) if stage.steps is not None else f"{stage.epochs:g} epochs"


def _limits(config: ExperimentConfig, part: str) -> str:
    """Returns the section about limitations."""
    if part == "alignvlm":
        return (
            "- A conversation, including its visual tokens, has at most "
            f"{config.model.language.max_position_embeddings} positions.\n"
            "- The connector and the parts trained with it saw only the data named above.\n"
            "- Answers can be wrong, and they have no confidence score. The checkpoint contains no evaluation results."
        )
    return "- This part was trained inside a vision-language model and has not been evaluated on its own."
