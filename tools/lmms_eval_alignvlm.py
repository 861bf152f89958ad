#!/usr/bin/env python3
"""Runs an exported model in lmms-eval: registers it as `alignvlm`, then calls lmms-eval's own command.

    alignvlm export --checkpoint runs/3b --out alignvlm-3b --dtype bfloat16
    pip install lmms-eval
    tools/lmms_eval_alignvlm.py --model alignvlm --model_args pretrained=alignvlm-3b --tasks docvqa_val,chartqa \
        --batch_size 8 --output_path logs

model_args: pretrained=FOLDER[,device=cuda:1][,dtype=bfloat16][,bare_questions=True]. `bare_questions` omits the text
that the task adds to the question (its `post_prompt`). Questions in DocDownstream, on which the paper's main models are
fine-tuned, have no such text either. Decoding is always greedy; the temperature of a task is ignored. Tasks that
compare likelihoods or have several rounds are not supported. Written for lmms-eval 0.7.3 and its `simple` model
interface.
"""

import pathlib
import sys
from itertools import groupby
from typing import Any

# Makes exported_model importable, and also this file, which lmms-eval imports by name.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

from exported_model import ExportedModel
from lmms_eval.api.model import lmms
from tqdm import tqdm

DEFAULT_MAX_NEW_TOKENS = 128


class AlignVLM(lmms):
    """Model with lmms-eval's `simple` interface: it takes requests and returns texts in the same order."""

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        bare_questions: bool | str = False,
        **kwargs: Any,
    ):
        super().__init__()
        if unknown := set(kwargs) - {"max_batch_size"}:
            raise ValueError(f"model_args: unknown {', '.join(sorted(unknown))}")
        self.exported = ExportedModel(pretrained, device=device or "auto", dtype=dtype)
        self.batch_size = int(batch_size)
        self.bare_questions = str(bare_questions).lower() == "true"

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers requests in batches."""
        answers = []
        with tqdm(total=len(requests), desc="alignvlm", unit="question", disable=self.rank != 0) as progress:
            # All requests of a batch must have the same options. Adjacent ones usually belong to one task, so they do.
            for (max_new_tokens, until), group in groupby(requests, key=lambda request: _options(request.args[1])):
                group = list(group)
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    texts = self.exported.answer(
                        [self._content(request) for request in batch], max_new_tokens=max_new_tokens
                    )
                    for request, text in zip(batch, texts, strict=True):
                        answers.append(_truncate(text, until))
                        self.cache_hook.add_partial("generate_until", (request.args[0], request.args[1]), answers[-1])
                    progress.update(len(batch))
        return answers

    def _content(self, request: Any) -> list[dict[str, Any]]:
        """Returns the parts of a request's message: images first, then the text."""
        text, _, doc_to_visual, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        visuals = [] if doc_to_visual is None else doc_to_visual(doc)
        if self.bare_questions and isinstance(doc.get("question"), str):
            text = doc["question"]
        return [{"type": "image", "image": visual} for visual in visuals or []] + [{"type": "text", "text": text}]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Raises an error, because tasks that compare likelihoods are not supported."""
        raise NotImplementedError("alignvlm: tasks that compare likelihoods are not supported, only generate_until")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Raises an error, because tasks with several rounds are not supported."""
        raise NotImplementedError("alignvlm: tasks with several rounds are not supported, only generate_until")


def _options(generation_kwargs: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Returns the maximum length of an answer, and the texts that end it."""
    until = generation_kwargs.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    return int(generation_kwargs.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)), until


def _truncate(text: str, until: tuple[str, ...]) -> str:
    """Returns the text before the first of the texts that end it."""
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text


def main() -> None:
    """Registers the model and runs lmms-eval."""
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest

    MODEL_REGISTRY_V2.register_manifest(
        ModelManifest(model_id="alignvlm", simple_class_path="lmms_eval_alignvlm.AlignVLM"), overwrite=True
    )
    cli_evaluate()


if __name__ == "__main__":
    main()
