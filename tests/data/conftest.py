"""Fixtures shared by several test files."""

import pytest

from alignvlm_jax.data.chat import ChatTokenizer
from tests.data.nano_tokenizer import write_chat_folder


@pytest.fixture(scope="session")
def chat(tmp_path_factory) -> ChatTokenizer:
    return ChatTokenizer.from_folder(write_chat_folder(tmp_path_factory.mktemp("tokenizer")))
