"""Fixtures with tiny models in JAX and PyTorch, each written and loaded once per test session."""

import dataclasses
import functools
import pathlib

import pytest
import torch
import transformers

from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.models.alignvlm import AlignVLMConfig
from tests.interop.pytorch import folders


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same model in JAX and in PyTorch, loaded by transformers from an exported folder."""

    config: AlignVLMConfig
    params: dict
    folder: pathlib.Path
    model: transformers.PreTrainedModel
    processor: transformers.ProcessorMixin
    chat: ChatTokenizer

    def inputs(self, *conversations: list[dict], **kwargs):
        """Returns the inputs that the exported processor computes from conversations."""
        return self.processor.apply_chat_template(
            list(conversations),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            **kwargs,
        )

    def prompts(self, *conversations: list[dict]):
        """Returns the prompts that the JAX reader computes from conversations."""
        return [folders.make_prompt(self.config, self.chat, messages) for messages in conversations]


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A function from (connector, tied) to a `Pair`, with a tied or untied head."""

    @functools.cache
    def make(connector: str = "align", tied: bool = True) -> Pair:
        config = folders.make_config(connector, tied)
        params = folders.make_params(config)
        folder = tmp_path_factory.mktemp("exported") / f"{connector}_{'tied' if tied else 'untied'}"
        folders.write_folder(folder, config, params)
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        chat = ChatTokenizer.from_folder(folder.parent / f"{folder.name}_chat")
        return Pair(config, params, folder, model.eval(), processor, chat)

    return make


@pytest.fixture(autouse=True)
def reproducible():
    """Seeds PyTorch before each test."""
    torch.manual_seed(0)
