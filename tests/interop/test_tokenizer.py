"""Import and export of Llama-family tokenizers: ids match transformers, templates accept images, loss on answers."""

import json
import random

import jinja2.nodes
import numpy as np
import PIL.Image
import pytest
from tokenizers import AddedToken, Tokenizer

from alignvlm_jax.backbones import backbone_folder
from alignvlm_jax.data.chat import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE, ChatTokenizer, compile_template
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop.tokenizer import export_tokenizer, import_tokenizer, read_exported_tokenizer
from alignvlm_jax.interop.typed_text import MARK, mark_typed_text, unmark_typed_text
from tests.interop.tokenizer_styles import LLAMA3_TEMPLATE, SMOLLM2_TEMPLATE, num_ids, write_style

transformers = pytest.importorskip("transformers")

STYLES = ("llama3", "base", "smollm2", "tinyllama", "llama2", "llama2_new")
LLAMA3_IMAGE = "<|reserved_special_token_0|>"


class Style:
    """A folder in one style, its import, its export, and the tokenizers that transformers loads from both folders."""

    def __init__(self, root, style):
        self.name = style
        self.folder = write_style(root / "folder", style)
        self.num_ids = num_ids(self.folder)
        self.imported = import_tokenizer(self.folder, num_embeddings=self.num_ids)
        self.imported.chat.save(root / "ours")
        # Saved and loaded again, as in a checkpoint.
        self.chat = ChatTokenizer.from_folder(root / "ours")
        self.exported_folder = root / "exported"
        export_tokenizer(root / "ours", self.exported_folder)
        self.original = transformers.AutoTokenizer.from_pretrained(self.folder)
        self.exported = transformers.AutoTokenizer.from_pretrained(self.exported_folder)
        self.image_token = self.exported.image_token

    def decode(self, ids):
        return self.chat._tokenizer.decode(list(ids), skip_special_tokens=False)


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    return {style: Style(tmp_path_factory.mktemp(style), style) for style in STYLES}


@pytest.fixture(params=STYLES)
def style(request, styles):
    return styles[request.param]


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes a folder and changes entries of its JSON files (None removes an entry)."""

    def write(style, files=()):
        folder = write_style(tmp_path / "model", style)
        for name, entries in dict(files).items():
            content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
            content = {key: value for key, value in {**content, **entries}.items() if value is not None}
            (folder / name).write_text(json.dumps(content))
        return folder

    return write


def user(text, images=0):
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def answer_spans(style, encoded):
    """Returns the text that has loss weight, one string per contiguous span."""
    spans, current = [], []
    for target, weight in zip([*encoded.tokens[1:], -1], [*encoded.loss_weights[:-1], 0], strict=True):
        if weight:
            current.append(target)
        elif current:
            spans.append(style.decode(current))
            current = []
    return spans


def random_text(rng, more=()):
    pieces = ["total", " the", "12.50", "\n", "  ", "é", "日本", "😀", "<|", "|>", "end", "?", "\t", " ", "Name:", "'s"]
    return "".join(rng.choice([*pieces, *more]) for _ in range(rng.randint(1, 12)))


def random_chat(rng, *, images, more=()):
    """Returns a random conversation that ends with an answer; half of them start with a system message."""
    text = random_text(rng, more)
    text = [{"type": "text", "text": text}] if images and rng.random() < 0.5 else text
    messages = [system(text)] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        content = [{"type": "text", "text": random_text(rng, more)}]
        for _ in range(rng.randint(0, 2) if images else 0):
            content.insert(rng.randint(0, len(content)), {"type": "image"})
        answer = random_text(rng, more)
        messages.append({"role": "user", "content": content if images else content[0]["text"]})
        messages.append(assistant([{"type": "text", "text": answer}] if images and rng.random() < 0.5 else answer))
    return messages


def count_images(messages):
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    return sum(part["type"] == "image" for part in parts)


def assert_same_ids(chat, reference, messages, **variables):
    """Asserts that transformers' tokenizer gives the same ids, for a training sequence and for a prompt."""
    for given, ours, generate in [
        (messages, chat.encode(messages, [1] * count_images(messages)), False),
        (messages[:-1], chat.encode_prompt(messages[:-1], [1] * count_images(messages[:-1])), True),
    ]:
        theirs = reference.apply_chat_template(given, add_generation_prompt=generate, return_dict=False, **variables)
        assert ours.tokens.tolist() == theirs


@pytest.mark.parametrize("name", [name for name in STYLES if name != "base"])
def test_text_ids_match_the_original_folder(name, styles):
    """The language model keeps the token ids that it was trained with."""
    style, rng = styles[name], random.Random(0)
    variables = {"date_string": "26 Jul 2024"} if name == "llama3" else {}
    for _ in range(30):
        assert_same_ids(style.chat, style.original, random_chat(rng, images=False), **variables)


def test_ids_with_images_match_the_exported_folder(style):
    rng, num_images = random.Random(1), 0
    for _ in range(30):
        messages = random_chat(rng, images=True)
        assert_same_ids(style.chat, style.exported, messages)
        num_images += count_images(messages)
    assert num_images > 20


@pytest.mark.parametrize("read", [ChatTokenizer.from_folder, read_exported_tokenizer])
def test_the_exported_folder_is_read_back_unchanged(style, read):
    chat = read(style.exported_folder)
    messages = [system("Short."), user("What is <|a the total?", 1), assistant("12.50")]
    for left, right in zip(chat.encode(messages, [3]), style.chat.encode(messages, [3]), strict=True):
        np.testing.assert_array_equal(left, right)
    if read is read_exported_tokenizer:
        assert chat.chat_template == style.chat.chat_template
    assert (chat.pad_id, chat.image_id, chat.end_ids) == (style.chat.pad_id, style.chat.image_id, style.chat.end_ids)


def test_a_tokenizer_saved_by_transformers_is_imported(style, tmp_path):
    """After training in PyTorch, the saved tokenizer contains the padding and truncation of the last batch."""
    theirs = transformers.AutoTokenizer.from_pretrained(style.exported_folder)
    theirs(["a", "the total"], padding="max_length", truncation=True, max_length=5)
    theirs.save_pretrained(tmp_path)
    imported = import_tokenizer(tmp_path, num_embeddings=style.imported.num_embeddings)
    assert (imported.num_embeddings, imported.chat.image_id) == (style.imported.num_embeddings, style.chat.image_id)
    assert (imported.chat.pad_id, imported.chat.end_ids) == (style.chat.pad_id, style.chat.end_ids)
    rng = random.Random(4)
    for _ in range(5):
        assert_same_ids(imported.chat, style.exported, random_chat(rng, images=True))


def test_the_nano_tokenizer_is_exported(tmp_path):
    """The nano tokenizer was not imported from a Hugging Face folder."""
    folder = backbone_folder("language", "nano")
    export_tokenizer(folder, tmp_path)
    chat, theirs = ChatTokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.image_token_id, theirs.pad_token_id) == (chat.image_id, chat.pad_id)
    assert (theirs.eos_token_id,) == chat.end_ids
    rng = random.Random(5)
    for _ in range(10):
        messages = [m for m in random_chat(rng, images=True) if m["role"] != "system"]
        assert_same_ids(chat, theirs, messages)


def test_a_partial_answer_can_be_continued(style):
    """`continue_final_message` of transformers searches the rendered conversation for the last text."""
    messages = [user("Total?", 1), assistant([{"type": "text", "text": "It is"}])]
    text = style.exported.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    assert text.endswith("It is") and text.count(style.image_token) == 1


def test_importing_an_export_changes_nothing(style):
    imported = import_tokenizer(style.exported_folder, num_embeddings=style.imported.num_embeddings)
    assert imported.chat.chat_template == style.chat.chat_template
    assert (imported.num_embeddings, imported.chat.image_id) == (style.imported.num_embeddings, style.chat.image_id)


@pytest.mark.parametrize("name", STYLES)
def test_text_around_replaced_passages_has_the_same_ids(name, styles):
    """The encoder temporarily replaces passages by marks, which must not change the ids next to them.

    The messages here contain the marks' own private-use characters, which transformers encodes as ordinary text.
    """
    style, rng = styles[name], random.Random(2)
    for _ in range(30):
        assert_same_ids(style.chat, style.exported, random_chat(rng, images=True, more=["\ue000", "\ue001"] * 3))


@pytest.mark.parametrize("flag", ["normalized", "lstrip", "rstrip"])
@pytest.mark.parametrize("name", ["llama3", "tinyllama", "llama2_new"])
def test_flags_of_special_tokens_are_respected(name, flag, tmp_path):
    """Some folders match special tokens in normalized text, or with the white space next to them."""
    folder = write_style(tmp_path / "model", name)
    vocabulary = json.loads((folder / TOKENIZER_FILE).read_text())
    vocabulary["added_tokens"] = [{**token, flag: True} for token in vocabulary["added_tokens"]]
    (folder / TOKENIZER_FILE).write_text(json.dumps(vocabulary))
    imported = import_tokenizer(folder, num_embeddings=600)
    imported.chat.save(tmp_path / "ours")
    export_tokenizer(tmp_path / "ours", tmp_path / "exported")
    rng = random.Random(6)
    for reference in map(transformers.AutoTokenizer.from_pretrained, (folder, tmp_path / "exported")):
        variables = {"date_string": "26 Jul 2024"} if name == "llama3" else {}
        for more in ((), ("\ue000", "\ue001")):
            for _ in range(8):
                assert_same_ids(imported.chat, reference, random_chat(rng, images=False, more=more), **variables)


def test_special_tokens_typed_by_users_stay_text(style):
    """The exported template marks them and the tokenizer removes the marks, so rendering first is safe.

    vllm-project/vllm#57740 and huggingface/transformers#47217: engines render a conversation, then tokenize it.
    """
    rng = random.Random(3)
    specials = [style.exported.eos_token, style.image_token, style.exported.bos_token]
    num_typed = 0
    for _ in range(20):
        messages = random_chat(rng, images=True, more=[*specials, MARK, MARK[0], MARK[1]])
        assert_same_ids(style.chat, style.exported, messages)
        ours = style.chat.encode(messages, [1] * count_images(messages)).tokens
        assert (ours == style.chat.image_id).sum() == count_images(messages)
        text = style.exported.apply_chat_template(messages, tokenize=False)
        assert style.exported(text, add_special_tokens=False)["input_ids"] == ours.tolist()
        num_typed += style.decode(ours).count(style.image_token) - count_images(messages)
    assert num_typed > 10


def test_special_tokens_typed_across_parts_stay_text(style):
    """Templates join the texts of adjacent parts."""
    for special in (style.exported.eos_token, style.image_token):
        parts = [{"type": "text", "text": text} for text in (f"a {special[:1]}", special[1:-1], f"{special[-1:]} b")]
        messages = [{"role": "user", "content": parts}, assistant("b")]
        assert_same_ids(style.chat, style.exported, messages)
        whole = style.chat.encode_prompt([user(f"a {special} b")]).tokens
        np.testing.assert_array_equal(style.chat.encode_prompt(messages[:1]).tokens, whole)


def test_marks_keep_other_tokens_whole():
    """Marked passages are short, but never part of a token that is not special, or of vLLM's `<prompt_embeds>`."""
    entries = [("<|a|>", True), ("<|b|>", True), ("<pad>", True), ("<p>", False), ("</s>", True), ("[X]", True)]
    vocabulary = {"added_tokens": [{"content": content, "special": special} for content, special in entries]}
    marked, template = mark_typed_text(vocabulary, "{{ messages[0].content }}")
    prompt = "<|a|> <|tool|> <p> <prompt_embeds> <pad> </s> [X] [ <"
    rendered = compile_template(template).render(messages=[{"role": "user", "content": prompt}])
    typed = "<|a|> <|tool|> <p> <prompt_embeds> <pad> </s> [X] [ <"
    for opening in ("<|", "<pa", "</", "[X"):
        typed = typed.replace(opening, opening[0] + MARK + opening[1:])
    assert rendered == typed
    assert mark_typed_text(marked, template) == (marked, template)
    assert unmark_typed_text(marked, template) == ({**vocabulary, "normalizer": None}, "{{ messages[0].content }}")


def test_the_exported_processor_makes_the_same_ids(style):
    """Texts have two visual tokens per image, and may contain passages that look like special tokens."""
    pytest.importorskip("torch")
    from alignvlm_jax.interop.pytorch.image_processing_alignvlm import AlignVLMImageProcessor
    from alignvlm_jax.interop.pytorch.processing_alignvlm import AlignVLMProcessor

    image_processor = AlignVLMImageProcessor(rule="ovis", tile_size=16, max_tiles=1, thumbnail=False)
    processor = AlignVLMProcessor(
        image_processor,
        style.exported,
        tokens_per_tile=2,
        image_token=style.image_token,
        chat_template=style.exported.chat_template,
    )
    rng, image = random.Random(7), PIL.Image.new("RGB", (16, 16))
    for more in ((), (style.exported.eos_token, style.image_token), ("\ue000", "\ue001")):
        for _ in range(10):
            messages = random_chat(rng, images=True, more=more)[:-1]
            given = []
            for message in messages:
                content = message["content"]
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                parts = [part | {"image": image} if part["type"] == "image" else part for part in parts]
                given.append({**message, "content": parts})
            theirs = processor.apply_chat_template(given, add_generation_prompt=True, tokenize=True, return_dict=True)
            ours = style.chat.encode_prompt(messages, [2] * count_images(messages))
            assert ours.tokens.tolist() == list(theirs["input_ids"][0])


def test_the_folder_of_the_decoder_alone_parses_typed_special_tokens(style, tmp_path):
    """The docstring of interop/tokenizer.py describes this difference."""
    export_tokenizer(style.exported_folder.parent / "ours", tmp_path, language_only=True)
    plain = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [user(f"a {style.image_token} b")]
    theirs = plain.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert theirs.count(style.chat.image_id) == 1
    assert style.chat.image_id not in style.chat.encode_prompt(messages).tokens


EXPECTED_ANSWERS = {
    "llama3": ["12.50<|eot_id|>", "no<|eot_id|>"],
    "base": [" 12.50<|end_of_text|>", "  no \n<|end_of_text|>"],
    "smollm2": ["12.50<|im_end|>", " no \n<|im_end|>"],
    "tinyllama": ["12.50</s>", "no \n</s>"],
    # The template trims the text and adds a space on both sides. Decoding removes the first one.
    "llama2": ["12.50 </s>", "no </s>"],
    "llama2_new": ["12.50 </s>", "no </s>"],
}


def test_only_answers_and_their_end_tokens_have_loss(style):
    messages = [system("Short."), user("Total?", 1), assistant("12.50"), user("<|eot_id|></s> b?"), assistant(" no \n")]
    encoded = style.chat.encode(messages, [2])
    assert answer_spans(style, encoded) == EXPECTED_ANSWERS[style.name]
    ends = encoded.tokens[1:][(encoded.loss_weights[:-1] > 0) & (encoded.loss_weights[1:] == 0)]
    assert set(ends) == {style.chat.end_ids[0]}
    assert (encoded.visual_index >= 0).sum() == 2


def test_a_prompt_is_the_start_of_a_training_sequence(style):
    encoded = style.chat.encode([user("Total?", 1), assistant("12.50")], [3])
    prompt = style.chat.encode_prompt([user("Total?", 1)], [3])
    first = np.flatnonzero(encoded.loss_weights)[0]
    np.testing.assert_array_equal(prompt.tokens, encoded.tokens[: first + 1])


def test_end_and_padding_ids_are_read_from_the_folder(styles):
    """Every token listed by Llama 3 ends an answer. Without a padding token, the end-of-text token is used."""
    llama3 = styles["llama3"].chat
    ends = ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"]
    assert llama3.end_ids == tuple(map(llama3.token_to_id, ends))
    assert llama3.pad_id == llama3.token_to_id("<|eot_id|>")
    assert styles["base"].chat.end_ids == (styles["base"].chat.token_to_id("<|end_of_text|>"),)
    assert styles["smollm2"].chat.end_ids == (2,)
    assert styles["llama2"].chat.end_ids == (2,)


def test_a_reserved_or_new_row_becomes_the_image_token(styles):
    """Llama 3 has reserved rows. The others need a new row, and their tables grow to a multiple of 64."""
    for name in ("llama3", "base"):
        assert styles[name].image_token == LLAMA3_IMAGE
        assert styles[name].imported.num_embeddings == styles[name].num_ids
    for name in ("smollm2", "tinyllama", "llama2", "llama2_new"):
        style = styles[name]
        assert (style.image_token, style.chat.image_id) == ("<image>", style.num_ids)
        assert style.num_ids < style.imported.num_embeddings <= style.num_ids + 64
        assert style.imported.num_embeddings % 64 == 0
        assert any(f"from {style.num_ids} to {style.imported.num_embeddings} rows" in n for n in style.imported.notes)


def test_the_exported_tokenizer_is_configured_for_generation(style):
    tokenizer = style.exported
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
    assert (tokenizer.image_token_id, tokenizer.pad_token_id) == (style.chat.image_id, style.chat.pad_id)
    assert tokenizer.eos_token_id in style.chat.end_ids
    assert tokenizer.padding_side == "left"
    # `write_style` left padding to 50 and truncation to 6 tokens in the folder; they must be gone.
    assert len(tokenizer("the total of the page " * 10).input_ids) > 50
    batch = tokenizer(["total", "the total of the page"], padding=True)
    assert batch["attention_mask"][0][0] == 0 and batch["attention_mask"][0][-1] == 1
    # Rendered prompts contain the begin-of-text token; encoding must not add another.
    text = tokenizer.apply_chat_template([user("a")], tokenize=False)
    assert tokenizer(text).input_ids == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", ["llama3", "tinyllama"])
def test_a_language_only_export_adds_the_begin_token_to_plain_text(name, styles, tmp_path):
    """The complete export removes this rule of the original folder; importing that export must not lose it."""
    style = styles[name]
    reimported = import_tokenizer(style.exported_folder, num_embeddings=style.imported.num_embeddings)
    for i, chat in enumerate((style.chat, reimported.chat)):
        chat.save(tmp_path / f"{i}")
        export_tokenizer(tmp_path / f"{i}", tmp_path / f"{i}_text", language_only=True)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{i}_text")
        assert theirs("the total").input_ids == style.original("the total").input_ids
        assert theirs("the total").input_ids[0] == theirs.bos_token_id


def test_the_date_in_a_template_is_fixed(write):
    """Templates may call `strftime_now`; both tokenizers must render the same fixed date."""
    template = "{{ strftime_now('%A %-d %B %Y, %d.%m.%y') }}" + SMOLLM2_TEMPLATE
    folder = write("smollm2", {CONFIG_FILE: {"chat_template": template}})
    imported = import_tokenizer(folder, num_embeddings=512)
    assert any("26 Jul 2024" in note for note in imported.notes)
    imported.chat.save(folder / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "ours")
    text = theirs.apply_chat_template([user("a")], tokenize=False)
    assert text.startswith("Friday 26 July 2024, 26.07.24<|im_start|>")
    assert_same_ids(imported.chat, theirs, [user("a"), assistant("b")])


def test_vllm_recognizes_that_the_template_accepts_content_parts(style):
    """vLLM looks for a loop over the content of each message in the template."""
    template = style.exported.chat_template
    tree = compile_template(template).environment.parse(template)
    assert any(
        isinstance(loop.iter, jinja2.nodes.Name) and loop.iter.name == "messages" and loop.target.name == "message"
        for loop in tree.find_all(jinja2.nodes.For)
    )
    assert any(
        isinstance(loop.iter, jinja2.nodes.Getitem)
        and loop.iter.node.name == "message"
        and loop.iter.arg.value == "content"
        for loop in tree.find_all(jinja2.nodes.For)
    )


def test_the_prelude_keeps_the_other_fields_of_a_message(style):
    """Tool calls have no content; templates that support them read other fields."""
    prelude = style.chat.chat_template.partition("{%- set messages = chat.messages %}\n")
    template = "".join(prelude[:2]) + "{% for m in messages %}[{{ m.role }} {{ m.name }} {{ m.content }}]{% endfor %}"
    messages = [{"role": "assistant", "name": "x"}, {"role": "user", "name": "y", "content": user("b", 1)["content"]}]
    text = style.exported.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert text == f"[assistant x ][user y {style.image_token}b]"


# A template that handles images itself, as those of vision-language models do.
VISION_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string %}{{- message.content }}
{%- else %}
    {%- for part in message.content %}
        {{- 'Picture: <image>\n' if part.type == 'image' else part.text }}
    {%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""


def test_base_models_get_a_plain_template(styles):
    base = styles["base"]
    assert any("no chat template" in note for note in base.imported.notes)
    messages = [system("Short."), user("Total?", 1), assistant("12.50"), user("Date?")]
    text = base.exported.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        f"<|begin_of_text|>Short.\nUser: {LLAMA3_IMAGE}Total?\nAssistant: 12.50<|end_of_text|>\nUser: Date?\nAssistant:"
    )


def test_image_token_and_template_can_be_given(write):
    folder = write("smollm2")
    imported = import_tokenizer(folder, num_embeddings=600, image_token="<repo_name>")
    assert (imported.chat.image_id, imported.num_embeddings) == (3, 600)
    imported = import_tokenizer(folder, num_embeddings=600, chat_template=VISION_TEMPLATE)
    assert imported.chat.chat_template == VISION_TEMPLATE
    tokens = imported.chat.encode_prompt([user("a", 1)], [2]).tokens
    assert "user\nPicture: <image><image>\na<|im_end|>" in imported.chat._tokenizer.decode(
        list(tokens), skip_special_tokens=False
    )
    assert imported.num_embeddings == 600 and imported.chat.image_id == num_ids(folder)  # a spare row


@pytest.mark.parametrize("nested", [None, "extra_special_tokens", "model_specific_special_tokens"])
def test_the_image_token_named_by_the_folder_is_used(write, nested):
    named = {"image_token": "<repo_name>"}
    folder = write("smollm2", {CONFIG_FILE: {nested: named} if nested else named})
    assert import_tokenizer(folder, num_embeddings=600).chat.image_id == 3


def test_an_image_token_need_not_be_special(write):
    folder = write("llama3")
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    tokenizer.add_tokens([AddedToken("<|image|>", special=False)])
    tokenizer.save(str(folder / TOKENIZER_FILE))
    chat = import_tokenizer(folder, num_embeddings=600).chat
    assert chat.image_id == tokenizer.token_to_id("<|image|>")
    assert (chat.encode_prompt([user("<|image|>", 1)], [3]).tokens == chat.image_id).sum() == 3


def test_reserved_tokens_in_use_are_not_taken(write):
    """The first reserved token is the padding token and the template uses the second, so a new one is added."""
    template = LLAMA3_TEMPLATE.replace("Environment: ipython", "<|reserved_special_token_1|>")
    config = {"pad_token": LLAMA3_IMAGE, "chat_template": template}
    folder = write("llama3", {CONFIG_FILE: config})
    chat = import_tokenizer(folder, num_embeddings=600).chat
    assert chat.image_id == num_ids(folder) and chat.pad_id == chat.token_to_id(LLAMA3_IMAGE)


def test_the_padding_token_of_llama3_is_recognized(write):
    folder = write("llama3")
    text = (folder / TOKENIZER_FILE).read_text().replace("<|reserved_special_token_1|>", "<|finetune_right_pad_id|>")
    (folder / TOKENIZER_FILE).write_text(text)
    chat = import_tokenizer(folder, num_embeddings=600).chat
    assert chat.pad_id == chat.token_to_id("<|finetune_right_pad_id|>") not in chat.end_ids


def test_the_template_is_found_in_every_location(write):
    """Template files take precedence over the config, and of several named templates "default" is used."""
    expected = import_tokenizer(write("smollm2"), num_embeddings=600).chat.encode_prompt([user("a", 1)], [2]).tokens
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": SMOLLM2_TEMPLATE}]
    folder = write("smollm2", {CONFIG_FILE: {"chat_template": named}})
    imported = import_tokenizer(folder, num_embeddings=600)
    assert any("'default'" in note for note in imported.notes)
    np.testing.assert_array_equal(imported.chat.encode_prompt([user("a", 1)], [2]).tokens, expected)
    # Older file names are read as well.
    for name, content in [
        ("chat_template.json", json.dumps({"chat_template": SMOLLM2_TEMPLATE})),
        (TEMPLATE_FILE, SMOLLM2_TEMPLATE),
    ]:
        folder = write("smollm2", {CONFIG_FILE: {"chat_template": "not this one"}})
        (folder / name).write_text(content)
        chat = import_tokenizer(folder, num_embeddings=600).chat
        np.testing.assert_array_equal(chat.encode_prompt([user("a", 1)], [2]).tokens, expected)
        (folder / name).unlink()


def test_token_names_are_found_in_other_files(write):
    """Without names in tokenizer_config.json, special_tokens_map.json is read, then the ids in the model files."""
    folder = write("llama2", {"special_tokens_map.json": {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}})
    template = json.loads((folder / CONFIG_FILE).read_text())["chat_template"]
    (folder / CONFIG_FILE).unlink()
    expected = import_tokenizer(folder, num_embeddings=600, chat_template=template).chat.encode_prompt([user("a")])
    (folder / "special_tokens_map.json").unlink()
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2]}))
    chat = import_tokenizer(folder, num_embeddings=600, chat_template=template).chat
    np.testing.assert_array_equal(chat.encode_prompt([user("a")]).tokens, expected.tokens)
    assert chat.end_ids == (2,)


def test_tokens_listed_only_in_the_config_are_added(write):
    listed = {"600": {"content": "<tool>", "special": True}, "3": {"content": "<repo_name>", "special": True}}
    folder = write("smollm2")
    new_id = num_ids(folder)
    listed[str(new_id)] = listed.pop("600")
    folder = write("smollm2", {CONFIG_FILE: {"added_tokens_decoder": listed}})
    chat = import_tokenizer(folder, num_embeddings=600).chat
    assert (chat.token_to_id("<tool>"), chat.image_id) == (new_id, new_id + 1)
    assert transformers.AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<tool>") == new_id


def test_vocabulary_and_embedding_sizes_are_compared(write):
    folder = write("smollm2", {CONFIG_FILE: {"pad_token": "[PAD]"}})
    size = num_ids(folder)
    with pytest.raises(UserError, match=f"{size} ids, but the embedding table has {size - 2} rows: none for 2 tokens"):
        import_tokenizer(folder, num_embeddings=size - 2)
    assert not any("belong to no token" in note for note in import_tokenizer(folder, num_embeddings=size).notes)
    notes = import_tokenizer(folder, num_embeddings=2 * size + 8).notes
    assert any(f"{size + 8} of the embedding table's {2 * size + 8} rows belong to no token" in note for note in notes)
    assert any("'[PAD]' is not in the vocabulary" in note for note in notes)


def test_no_token_is_added_to_ids_with_gaps(write):
    """`tokenizers` gives a new token the number of tokens as its id; with gaps, that id may be taken."""
    folder = write("smollm2")
    vocabulary = json.loads((folder / TOKENIZER_FILE).read_text())
    vocabulary["model"]["vocab"]["unseen"] = num_ids(folder) + 10
    (folder / TOKENIZER_FILE).write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match="gaps, so '<image>' cannot be appended"):
        import_tokenizer(folder, num_embeddings=600)
    assert import_tokenizer(folder, num_embeddings=600, image_token="<repo_name>").chat.image_id == 3


def test_unusable_folders_are_refused(write, tmp_path):
    def import_error(folder, **arguments):
        """Returns the error of an import that must fail and leave nothing behind."""
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError) as caught:
            import_tokenizer(folder, num_embeddings=600, **arguments)
        assert str(folder) in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before
        return str(caught.value)

    assert "no such folder" in import_error(tmp_path / "nowhere")
    folder = write("smollm2")
    assert "choose another" in import_error(folder, image_token="<|im_end|>")
    assert "occur in ordinary text" in import_error(folder, image_token="total")
    template = VISION_TEMPLATE + "<repo_name>"
    assert "where there is no image" in import_error(folder, image_token="<repo_name>", chat_template=template)
    assert "line 1" in import_error(folder, chat_template="{% if %}")
    assert "be located" in import_error(folder, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "does not render the user's text and the image" in import_error(
        folder, chat_template="{{ messages[0].role }}"
    )
    assert "does not name the token that ends a text" in import_error(
        write("smollm2", {CONFIG_FILE: {"eos_token": None}, "generation_config.json": {"eos_token_id": None}})
    )
    assert "eos_token '<end>' is not in" in import_error(write("smollm2", {CONFIG_FILE: {"eos_token": "<end>"}}))
    listed = {"5": {"content": "<tool>"}}
    assert "do not belong to the same tokenizer" in import_error(
        write("smollm2", {CONFIG_FILE: {"added_tokens_decoder": listed}})
    )
    assert "not a map of tokens" in import_error(write("smollm2", {CONFIG_FILE: {"added_tokens_decoder": {"a": 1}}}))
    assert "no vocabulary" in import_error(write("smollm2", {TOKENIZER_FILE: {"model": {"type": "BPE"}}}))
    assert "not a tokenizer" in import_error(
        write("smollm2", {TOKENIZER_FILE: {"model": {"type": "BPE", "vocab": {"a": 0}}}})
    )
    for name in (CONFIG_FILE, "generation_config.json", TOKENIZER_FILE):
        folder = write("smollm2")
        for content, complaint in (("{", "not valid JSON"), ("[]", "not a JSON object")):
            (folder / name).write_text(content)
            message = import_error(folder)
            assert complaint in message and name in message
    (folder / TOKENIZER_FILE).unlink()
    assert f"has no {TOKENIZER_FILE}" in import_error(folder)
    (folder / "tokenizer.model").write_bytes(b"spm")
    assert "save_pretrained" in import_error(folder)


def test_listed_end_ids_without_a_token_are_ignored(write):
    folder = write("smollm2", {"generation_config.json": {"eos_token_id": [2, 5000]}})
    imported = import_tokenizer(folder, num_embeddings=600)
    assert imported.chat.end_ids == (2,)
    assert any("5000" in note for note in imported.notes)
