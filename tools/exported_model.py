"""An exported folder as something that answers conversations: what the adapters for evaluation harnesses share.

Needs torch and transformers 5, and neither JAX nor alignvlm_jax.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


class ExportedModel:
    """A folder that `tools/export_pytorch.py` wrote."""

    def __init__(self, pretrained: str, *, device: str = "auto", dtype: str = "auto"):
        """Args:
        pretrained: the folder, or where it was uploaded to.
        device: as torch names them; auto takes the first CUDA device, or else the CPU.
        dtype: of the weights; auto leaves them as they are stored.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        model = AutoModelForImageTextToText.from_pretrained(pretrained, trust_remote_code=True, dtype=dtype)
        self.model = model.eval().to(self.device)
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True)

    def answer(self, contents: Sequence[list[dict[str, Any]]], *, max_new_tokens: int) -> list[str]:
        """The model's answers, decoded greedily in one batch.

        Args:
          contents: of each user's message its parts, {"type": "text", "text"} and {"type": "image"} with a PIL "image"
            or a "path".
          max_new_tokens: where an answer that does not end is cut off.
        """
        inputs = self.processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in contents],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        ).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]
