#!/usr/bin/env python3
"""Runs an exported model in VLMEvalKit: registers it there as `alignvlm`, then is VLMEvalKit's run.py.

    tools/export_pytorch.py --checkpoint runs/3b --out alignvlm-3b --dtype bfloat16
    git clone https://github.com/open-compass/VLMEvalKit; cd VLMEvalKit; pip install -e .
    python ../tools/vlmeval_alignvlm.py --pretrained ../alignvlm-3b --data DocVQA_VAL ChartQA_TEST --reuse

Everything but the options below goes to run.py of the current folder, `--model alignvlm` is added. VLMEvalKit's
questions end in "Answer the question using a single word or phrase."; with --bare-questions those of DocVQA, InfoVQA,
ChartQA and TextVQA are asked as they stand, as DocDownstream does, on which the paper's main models are fine-tuned.
Written against VLMEvalKit of 2025 (vlmeval.vlm.base.BaseModel, vlmeval.config.supported_VLM).
"""

import argparse
import functools
import pathlib
import runpy
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # where exported_model is

from exported_model import ExportedModel
from vlmeval.vlm.base import BaseModel

NAME = "alignvlm"
_BARE = ("DocVQA", "InfoVQA", "ChartQA", "TextVQA")


class AlignVLM(BaseModel):
    """The model as VLMEvalKit wants it: texts and images, as they follow each other, in; a text out."""

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
        content = [
            {"type": "image", "path": part["value"]}
            if part["type"] == "image"
            else {"type": "text", "text": part["value"]}
            for part in message
        ]
        return self.exported.answer([content], max_new_tokens=self.max_new_tokens)[0]

    def use_custom_prompt(self, dataset: str) -> bool:
        return self.bare_questions and dataset.startswith(_BARE)

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
        paths = self.dump_image(line, dataset)
        paths = [paths] if isinstance(paths, str) else paths
        return [*({"type": "image", "value": path} for path in paths), {"type": "text", "value": line["question"]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="the folder that tools/export_pytorch.py wrote")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--bare-questions", action="store_true")
    args, rest = parser.parse_known_args()
    if not pathlib.Path("run.py").is_file():
        parser.error("run.py is not here: run this from the folder of VLMEvalKit's clone")

    from vlmeval.config import supported_VLM

    supported_VLM[NAME] = functools.partial(AlignVLM, **vars(args))
    sys.argv = ["run.py", "--model", NAME, *rest]
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
