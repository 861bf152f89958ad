"""Loads an exported model and answers messages; shared by the adapters for evaluation harnesses.

It needs torch and transformers 5, but neither JAX nor alignvlm_jax.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


class ExportedModel:
    """Model and processor of a folder written by `alignvlm export`."""

    def __init__(self, pretrained: str, *, device: str = "auto", dtype: str = "auto"):
        """Loads the model.

        Args:
          pretrained: the folder, or the name of its upload on the Hugging Face Hub.
          device: torch device; "auto" is the first CUDA device, or the CPU if there is none.
          dtype: dtype of the weights; "auto" keeps the stored one.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if "://" in pretrained:
            raise ValueError(f"{pretrained}: expected a folder, or the name of an upload on the Hugging Face Hub")
        pretrained = os.path.expanduser(pretrained)
        model = AutoModelForImageTextToText.from_pretrained(pretrained, trust_remote_code=True, dtype=dtype)
        self.model = model.eval().to(self.device)
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True)

    def answer(self, contents: Sequence[list[dict[str, Any]]], *, max_new_tokens: int) -> list[str]:
        """Answers messages by greedy decoding, in one batch.

        Args:
          contents: parts of each user message: {"type": "text", "text"}, and {"type": "image"} with a PIL "image" or a
            "path".
          max_new_tokens: maximum length of an answer.

        Returns:
          The answers, in the order of the messages, without leading and trailing white space.
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
        # `generate` returns the prompts, too. All have the same padded length.
        texts = self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]
