"""Tests of the chat tokenizer.

Its tokens equal those of transformers, special tokens that users type stay text, and only answers have loss weight.
"""

import json
import pickle
import random

import numpy as np
import pytest

from alignvlm_jax.data.chat import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE, ChatTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop.tokenizer import import_tokenizer
from tests.data.nano_tokenizer import SPECIAL_TOKENS, TOKENIZER_CONFIG, write_chat_folder
from tests.interop.tokenizer_styles import num_ids, write_style

# Like the template of Llama 3: text between header and content, trimmed contents, a default system message.
LLAMA_LIKE_TEMPLATE = """{{- bos_token }}
{%- if messages[0]['role'] != 'system' %}
    {{- '<|user|>system\\n\\nCutting Knowledge Date: December 2023<|end|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|user|>' + message['role'] + '<|assistant|>\\n\\n' }}
    {%- if message['content'] is string %}{{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- image_token if part.type == 'image' else part.text | trim }}
        {%- endfor %}
    {%- endif %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|user|>assistant<|assistant|>\\n\\n' }}{%- endif %}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_folder(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def chat(folder):
    return ChatTokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    return write_chat_folder(tmp_path_factory.mktemp("llama"), template=LLAMA_LIKE_TEMPLATE)


def user(text, images=0):
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(chat, ids):
    """Returns the text of the ids, including special tokens."""
    return chat._tokenizer.decode(list(ids), skip_special_tokens=False)


def answers(chat, encoded):
    """Returns the texts with loss weight, one for each contiguous range."""
    spans, current = [], []
    for target, weight in zip(encoded.tokens[1:], encoded.loss_weights[:-1], strict=True):
        if weight:
            current.append(target)
        elif current:
            spans.append(read(chat, current))
            current = []
    return spans + ([read(chat, current)] if current else [])


def test_worked_example(chat):
    encoded = chat.encode([user("Total?", images=1), assistant("12.50")], [3])
    assert read(chat, encoded.tokens) == "<|begin|><|user|><|image|><|image|><|image|>Total?<|assistant|>12.50<|end|>"
    np.testing.assert_array_equal(np.flatnonzero(encoded.tokens == chat.image_id), [2, 3, 4])
    np.testing.assert_array_equal(encoded.visual_index[:6], [-1, -1, 0, 1, 2, -1])
    assert (encoded.visual_index[5:] == -1).all()
    assert answers(chat, encoded) == ["12.50<|end|>"]
    assert encoded.loss_weights[-1] == 0
    assert [array.dtype for array in encoded] == [np.int32, np.float32, np.int32]
    assert len({len(array) for array in encoded}) == 1


def test_ids(chat):
    assert [chat.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4, 5]
    assert (chat.pad_id, chat.image_id, chat.end_ids) == (1, 2, (5,))
    assert 262 < chat.vocab_size <= 340  # 6 special tokens, 256 bytes, and the merges that the small corpus allows


def test_visual_index_continues_over_images(chat):
    encoded = chat.encode([user("Same?", images=2), assistant("no")], [2, 3])
    np.testing.assert_array_equal(encoded.visual_index[:8], [-1, -1, 0, 1, 2, 3, 4, -1])


def test_only_the_answers_of_all_turns_have_loss_weight(chat):
    encoded = chat.encode(
        [user("a?", 1), assistant("one"), user("b?"), assistant(""), user("c?"), assistant(" x ")], [4]
    )
    assert answers(chat, encoded) == ["one<|end|>", "<|end|>", " x <|end|>"]


def test_prompt_equals_the_beginning_of_the_training_tokens(chat):
    """At inference, the model reads exactly the tokens before the first target with loss weight."""
    encoded = chat.encode([user("Total?", 1), assistant("12.50")], [3])
    prompt = chat.encode_prompt([user("Total?", 1)], [3])
    first = np.flatnonzero(encoded.loss_weights)[0]  # the weight at position i is that of the target, token i + 1
    np.testing.assert_array_equal(prompt.tokens, encoded.tokens[: first + 1])
    np.testing.assert_array_equal(prompt.visual_index, encoded.visual_index[: first + 1])
    assert not prompt.loss_weights.any()


def test_decode(chat):
    assert chat.decode(chat.encode([user("hm"), assistant("Preis: 5 €")]).tokens) == "hmPreis: 5 €"
    assert chat.decode(chat.encode_text("a<|end|>")) == "a<|end|>"


def test_token_text(chat, tmp_path):
    sentencepiece = import_tokenizer(write_style(tmp_path, "llama2"), num_embeddings=num_ids(tmp_path)).chat
    text = "What is the total? 12.50"
    for tokenizer, begin in ((chat, ""), (sentencepiece, " ")):  # Llama 2's tokenizer puts a space before the text
        assert "".join(map(tokenizer.token_text, map(int, tokenizer.encode_text(text)))) == begin + text
        assert tokenizer.token_text(tokenizer.image_id).startswith("<")
        assert tokenizer.token_text(99999) == "<99999>"
        # A character of several tokens: each token still has a text that can be displayed.
        parts = [tokenizer.token_text(int(token)) for token in tokenizer.encode_text("€")]
        assert len(parts) >= 3 and not any("\ufffd" in part or part == "" for part in parts)
    assert chat.token_text(chat.image_id) == "<|image|>"


@pytest.mark.parametrize("special", [*SPECIAL_TOKENS, "\ue0000\ue001", "\ue000", "\ue001"])
def test_special_tokens_typed_by_users_stay_text(chat, special):
    question, answer = f"what is {special}? {special}", f"{special}{special} it is"
    encoded = chat.encode([user(question, 1), assistant(answer), user("b"), assistant("c")], [2])
    expected = (
        f"<|begin|><|user|><|image|><|image|>{question}<|assistant|>{answer}<|end|><|user|>b<|assistant|>c<|end|>"
    )
    assert read(chat, encoded.tokens) == expected
    assert answers(chat, encoded) == [f"{answer}<|end|>", "c<|end|>"]
    # The only special tokens are the 9 from the template, including two positions for the image.
    specials = [chat.token_to_id(token) for token in SPECIAL_TOKENS]
    assert np.isin(encoded.tokens, specials).sum() == 9
    assert (encoded.visual_index >= 0).sum() == 2


def _random_text(rng):
    pieces = ["total", " the", "12.50", "\n", "  ", "é", "日本", "😀", "<|", "|>", "end", "?", "\t", " ", "Name:", "'s"]
    return "".join(rng.choice(pieces) for _ in range(rng.randint(0, 12)))


def test_special_tokens_typed_across_parts_stay_text(chat):
    """Templates join adjacent texts, so a token may be spread over several parts (compare vllm-project/vllm#57740)."""
    for special in ("<|image|>", "<|end|>"):
        for cuts in ((1,), (1, 7), (2, 3, 4)):
            edges = [0, *cuts, len(special)]
            texts = [special[start:end] for start, end in zip(edges, edges[1:], strict=False)]
            parts = [{"type": "text", "text": text} for text in texts]
            encoded = chat.encode_prompt([{"role": "user", "content": parts}])
            assert read(chat, encoded.tokens) == f"<|begin|><|user|>{special}<|assistant|>"
            np.testing.assert_array_equal(encoded.tokens, chat.encode_prompt([user(special)]).tokens)


@pytest.mark.parametrize("which", ["folder", "llama_folder"])
def test_same_as_transformers(which, request):
    transformers = pytest.importorskip("transformers")
    folder = request.getfixturevalue(which)
    chat = ChatTokenizer.from_folder(folder)
    official = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    rng = random.Random(0)
    for _ in range(60):
        messages = []
        for _ in range(rng.randint(1, 3)):
            messages += [user(_random_text(rng), rng.randint(0, 1)), assistant(_random_text(rng))]
        images = sum(part == {"type": "image"} for message in messages[::2] for part in message["content"])
        for mine, given, generate in [
            (chat.encode(messages, [1] * images), messages, False),
            (chat.encode_prompt(messages[:-1], [1] * images), messages[:-1], True),
        ]:
            theirs = official.apply_chat_template(given, add_generation_prompt=generate, return_dict=False)
            assert mine.tokens.tolist() == theirs


def test_answers_with_text_between_header_and_content(llama_folder):
    """The newlines after the header belong to the prompt, and the template trims the space before the answer."""
    chat = ChatTokenizer.from_folder(llama_folder)
    encoded = chat.encode([user("Total?", 1), assistant(" 12.50\n"), user("<|end|>"), assistant("ok")], [2])
    assert answers(chat, encoded) == ["12.50<|end|>", "ok<|end|>"]


def test_generation_blocks_change_nothing(tmp_path, chat):
    # transformers uses such blocks to mark the answer in a template.
    template = chat._files[2].replace("{{- eos_token -}}", "{%- generation -%}{{- eos_token -}}{%- endgeneration -%}")
    marked = ChatTokenizer.from_folder(write_chat_folder(tmp_path, template=template))
    messages = [user("a", 1), assistant("b")]
    np.testing.assert_array_equal(marked.encode(messages, [2]).tokens, chat.encode(messages, [2]).tokens)


def test_pickle_and_save(chat, tmp_path):
    messages = [user("a <|end|>", 1), assistant("b")]
    chat.save(tmp_path / "copy")
    for other in (pickle.loads(pickle.dumps(chat)), ChatTokenizer.from_folder(tmp_path / "copy")):
        for mine, theirs in zip(chat.encode(messages, [2]), other.encode(messages, [2]), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_wrong_conversations(chat):
    with pytest.raises(UserError, match="1 image marks for 0 images"):
        chat.encode([user("a", 1), assistant("b")])
    with pytest.raises(UserError, match="0 image marks for 1 images"):
        chat.encode([user("a <|image|>"), assistant("b")], [3])
    with pytest.raises(UserError, match="role must be"):
        chat.encode([{"role": "robot", "content": "a"}])
    with pytest.raises(UserError, match="must be a string, not NoneType"):
        chat.encode([{"role": "user", "content": None}])
    with pytest.raises(UserError, match="trained without system messages"):
        chat.encode([{"role": "system", "content": "a"}, user("b"), assistant("c")])
    with pytest.raises(UserError, match="an image or a text, not video"):
        chat.encode_prompt([{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(UserError, match="no answer"):
        chat.encode([user("b")])


def test_half_a_surrogate_pair_is_named(chat):
    """huggingface/transformers#43459: the tokenizer's error only says that the text "must be str"."""
    with pytest.raises(UserError, match=r"half a surrogate pair.*ok\\ud800bad"):
        chat.encode_prompt([user("ok\ud800bad")], [])


def test_wrong_folders(folder, tmp_path):
    with pytest.raises(UserError, match="tokenizer_config.json: no such file"):
        ChatTokenizer.from_folder(tmp_path)
    with pytest.raises(UserError, match="line 1"):
        ChatTokenizer.from_folder(write_chat_folder(tmp_path / "a", template="{% if %}"))
    with pytest.raises(UserError, match="image_token is missing"):
        config = {key: value for key, value in TOKENIZER_CONFIG.items() if key != "extra_special_tokens"}
        ChatTokenizer.from_folder(write_chat_folder(tmp_path / "b", config=config))
    with pytest.raises(UserError, match="'<img>' is not a special token"):
        config = {**TOKENIZER_CONFIG, "extra_special_tokens": {"image_token": "<img>"}}
        ChatTokenizer.from_folder(write_chat_folder(tmp_path / "c", config=config))
    with pytest.raises(UserError, match="be located"):
        ChatTokenizer.from_folder(write_chat_folder(tmp_path / "d", template="{{ messages[-1].content }}"))
    broken = write_chat_folder(tmp_path / "e")
    (broken / TOKENIZER_FILE).write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        ChatTokenizer.from_folder(broken)
    (broken / CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        ChatTokenizer.from_folder(broken)


def test_template_inside_the_config(tmp_path, chat):
    """The template is stored in the config, its older location, and there is no padding token, as in Llama's files."""
    folder = write_chat_folder(tmp_path)
    config = {**json.loads((folder / CONFIG_FILE).read_text()), "chat_template": (folder / TEMPLATE_FILE).read_text()}
    del config["pad_token"]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    (folder / TEMPLATE_FILE).unlink()
    older = ChatTokenizer.from_folder(folder)
    messages = [user("a", 1), assistant("b")]
    np.testing.assert_array_equal(older.encode(messages, [2]).tokens, chat.encode(messages, [2]).tokens)
    assert older.pad_id == chat.end_ids[0]
