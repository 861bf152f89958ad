#!/usr/bin/env python3
"""Runs an exported model in VLMEvalKit: registers it as `alignvlm`, then runs VLMEvalKit's run.py.

    alignvlm export --checkpoint runs/3b --out alignvlm-3b --dtype bfloat16
    git clone https://github.com/open-compass/VLMEvalKit; cd VLMEvalKit; pip install -e .
    python ../tools/vlmeval_alignvlm.py --pretrained ../alignvlm-3b --data DocVQA_VAL ChartQA_TEST --reuse

All options other than those below are passed to run.py in the current folder, with `--model alignvlm` added.
VLMEvalKit's questions end with "Answer the question using a single word or phrase." --bare-questions omits this text
for DocVQA, InfoVQA, ChartQA and TextVQA. Questions in DocDownstream, on which the paper's main models are fine-tuned,
do not have it either. Written for VLMEvalKit of 2025 (vlmeval.vlm.base.BaseModel, vlmeval.config.supported_VLM).
"""

import argparse
import functools
import pathlib
import runpy
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for exported_model

from exported_model import ExportedModel
from vlmeval.vlm.base import BaseModel

NAME = "alignvlm"
_BARE = ("DocVQA", "InfoVQA", "ChartQA", "TextVQA")


class AlignVLM(BaseModel):
    """Model with VLMEvalKit's interface: it takes texts and images in any order and returns a text."""

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        dtype: str = "auto",
        max_new_tokens: int = 512,
        bare_questions: bool = False,
    ):
        super().__init__()
        self.exported = ExportedModel(pretrained, device=device, dtype=dtype)
        self.max_new_tokens, self.bare_questions = max_new_tokens, bare_questions

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """Returns the answer to a message."""
        content = [
            {"type": "image", "path": part["value"]}
            if part["type"] == "image"
            else {"type": "text", "text": part["value"]}
            for part in message
        ]
        return self.exported.answer([content], max_new_tokens=self.max_new_tokens)[0]

    def use_custom_prompt(self, dataset: str) -> bool:
        """Returns whether `build_prompt`, instead of VLMEvalKit, makes the prompts of a data set."""
        return self.bare_questions and dataset.startswith(_BARE)

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
        """Returns the images and the bare question of a row."""
        paths = self.dump_image(line, dataset)
        paths = [paths] if isinstance(paths, str) else paths
        return [*({"type": "image", "value": path} for path in paths), {"type": "text", "value": line["question"]}]


def main() -> None:
    """Registers the model and runs VLMEvalKit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="folder written by alignvlm export")
    parser.add_argument("--device", default="auto", help="torch device (default: the first CUDA device, or the CPU)")
    parser.add_argument("--dtype", default="auto", help="data type of the weights (default: as stored)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="maximum length of an answer (default: 512)")
    parser.add_argument("--bare-questions", action="store_true", help="ask the bare questions; see above")
    args, rest = parser.parse_known_args()
    if not pathlib.Path("run.py").is_file():
        parser.error("run.py not found in the current folder. Run this from the folder of VLMEvalKit's clone")

    from vlmeval.config import supported_VLM

    supported_VLM[NAME] = functools.partial(AlignVLM, **vars(args))
    sys.argv = ["run.py", "--model", NAME, *rest]
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
