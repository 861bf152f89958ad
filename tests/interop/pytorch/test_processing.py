"""The exported processor against the JAX reader: the same tiles and token ids, for all forms of images."""

import base64
import io
import itertools
import os
import struct
import subprocess
import sys
import zlib

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import transformers
from transformers.dynamic_module_utils import get_imports

from alignvlm_jax.data.images import open_image
from alignvlm_jax.data.tiling import cut_tiles, plan_tiles
from alignvlm_jax.interop.pytorch import REMOTE_CODE_FILES
from alignvlm_jax.interop.pytorch.image_processing_alignvlm import AlignVLMImageProcessor
from alignvlm_jax.models.vision import normalize_tiles
from tests.data.test_png import chunk, png
from tests.data.tiff_files import tiff
from tests.interop.pytorch.folders import TILING, ask, random_image, tiles_of


def assert_same_tiles(pixel_values, tiles, valid_hw):
    """Asserts that every pixel is the normalized byte of the JAX reader, and exactly 0 outside the image."""
    pixels = np.asarray(pixel_values).transpose(0, 2, 3, 1)
    assert pixels.dtype == np.float32
    side = np.arange(TILING.tile_size)
    inside = (side[:, None] < valid_hw[:, None, None, 0]) & (side < valid_hw[:, None, None, 1])
    expected = tiles.astype(np.float32) / np.float32(127.5) - np.float32(1)
    np.testing.assert_array_equal(pixels, np.where(inside[..., None], expected, np.float32(0)))
    # XLA multiplies by 1 / 127.5 instead of dividing, and may fuse it with the subtraction.
    ours = np.asarray(normalize_tiles(jnp.asarray(tiles), jnp.asarray(valid_hw)))
    np.testing.assert_allclose(pixels, ours, rtol=0, atol=1.2e-7)
    np.testing.assert_array_equal(pixels == 0, ours == 0)


@pytest.mark.parametrize(
    "width, height", [(20, 20), (1, 1), (5, 3), (1, 300), (300, 1), (37, 81), (200, 150), (21, 20)]
)
def test_tiles_match_the_reader(pair, width, height):
    inputs = pair().inputs(ask("a", random_image(0, width, height)))
    assert_same_tiles(inputs["pixel_values"], *next(tiles_of(ask("a", random_image(0, width, height)))))


def unusual_images() -> dict[str, bytes]:
    """Returns image files of kinds that transformers' own loader reads differently or not at all."""
    scene = random_image(4, 34, 22)
    gray = np.asarray(scene.convert("L"))
    alpha = scene.convert("RGBA")
    alpha.putalpha(PIL.Image.fromarray(gray))
    rotation = PIL.Image.Exif()
    rotation[0x0112] = 6
    palette = scene.convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    files = {
        "plain": (scene, "PNG", {}),
        "rotated": (scene, "JPEG", {"exif": rotation}),
        "alpha": (alpha, "PNG", {}),
        "gray alpha": (alpha.convert("LA"), "PNG", {}),
        "palette": (palette, "PNG", {}),
        "transparent color": (palette, "PNG", {"transparency": palette.getpixel((0, 0))}),
        "16 bits": (PIL.Image.fromarray(gray.astype(np.uint16) * 257), "PNG", {}),
        "floats": (PIL.Image.fromarray(gray.astype(np.float32) / 255), "TIFF", {}),
        "cmyk": (scene.convert("CMYK"), "JPEG", {}),
        "bilevel": (scene.convert("1"), "PNG", {}),
    }
    encoded = {}
    for name, (image, format, options) in files.items():
        stream = io.BytesIO()
        image.save(stream, format, **options)
        encoded[name] = stream.getvalue()
    # Files that PIL reads wrong or not at all.
    encoded["12 bits"] = tiff(gray.astype(np.uint16) * 16 + gray // 16, 12)
    encoded["white is zero"] = tiff(65535 - gray.astype(np.uint16) * 257, photometric=0)
    encoded["planes"] = tiff(np.asarray(scene).astype(np.uint16) * 257, photometric=2, planar=2)
    transparent = chunk(b"tRNS", struct.pack(">H", int(gray[3, 3]) * 257))
    encoded["transparent gray"] = png(gray.astype(np.uint16) * 257, 16, before=transparent)
    encoded["metadata"] = png(gray, before=chunk(b"iCCP", b"scanner\0\0" + zlib.compress(bytes(2 << 20))))
    return encoded


@pytest.mark.parametrize("kind, data", unusual_images().items())
def test_unusual_images_match_the_reader_from_every_source(pair, tmp_path, kind, data):
    pair = pair()
    path = tmp_path / "page.bin"
    path.write_bytes(data)
    image = open_image(data)
    expected = cut_tiles(image, plan_tiles(*image.size, TILING), TILING.tile_size)
    sources = {
        "path": str(path),
        "url": "data:image/png;base64," + base64.b64encode(data).decode(),
        "base64": base64.b64encode(data).decode(),
        "image": PIL.Image.open(path) if kind != "metadata" else None,
    }
    if kind == "metadata":
        del sources["image"]  # PIL cannot open it
    for key, source in sources.items():
        message = {"role": "user", "content": [{"type": "image", key: source}, {"type": "text", "text": "a"}]}
        assert_same_tiles(pair.inputs([message])["pixel_values"], *expected)
    assert_same_tiles(pair.processor(images=str(path), text="<|image|>")["pixel_values"], *expected)


def test_a_file_that_is_no_image_is_named(pair, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(ValueError, match=r"photo.jpg: not an image .*HEIC.*pillow-heif"):
        pair().processor.image_processor(str(path))
    with pytest.raises(ValueError, match="a PDF.*pdftoppm"):
        pair().processor.image_processor("data:application/pdf;base64," + base64.b64encode(b"%PDF-1.7").decode())


def test_the_loader_of_transformers_gives_other_pixels(tmp_path):
    """This is why the processor overrides `fetch_images`."""
    (tmp_path / "page.png").write_bytes(unusual_images()["alpha"])
    theirs = np.asarray(transformers.image_utils.load_image(str(tmp_path / "page.png")))
    assert (theirs != np.asarray(open_image(tmp_path / "page.png"))).any()


def test_arrays_and_tensors_are_accepted_as_images(pair):
    processor = transformers.AutoImageProcessor.from_pretrained(pair().folder, trust_remote_code=True)
    image = random_image(0, 30, 50)
    expected = processor(image)
    array = np.asarray(image)
    tensor = transformers.image_utils.to_numpy_array(array).transpose(2, 0, 1)
    for given in (array, tensor, [[image]], [array]):
        features = processor(given, return_tensors="np")
        np.testing.assert_array_equal(features["pixel_values"], expected["pixel_values"])
        assert features["num_tiles"].tolist() == [5]
    with pytest.raises(ValueError, match="uint8"):
        processor(array / 255.0)
    with pytest.raises(ValueError, match="neither a file"):
        processor("nowhere.png")


CONVERSATIONS = {
    "text": ask("Read the page."),
    "image": ask("What is the total?", random_image(0, 30, 50)),
    "images": ask("Date:", random_image(1, 20, 10), random_image(2, 35, 20), random_image(3, 7, 9)),
    "turns": [
        *ask("What is the total?", random_image(1, 40, 10)),
        {"role": "assistant", "content": [{"type": "text", "text": "12.50"}]},
        *ask("And the date?", random_image(2, 10, 10)),
    ],
    # Special tokens in a user's text stay text.
    "typed": ask("a<|image|> b <|end|><|user|>c\ue000 d<\ue000|image|>", random_image(0, 30, 50)),
    "only typed": ask("<|assistant|>"),
    "other letters": ask("Gebühr 12,50 € 合計 \U0001f600", random_image(0, 9, 9)),
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_token_ids_match_the_reader(pair, kind):
    pair, messages = pair(), CONVERSATIONS[kind]
    (prompt,) = pair.prompts(messages)
    inputs = pair.inputs(messages)
    np.testing.assert_array_equal(inputs["input_ids"][0], prompt.tokens)
    assert inputs["attention_mask"].all()
    assert ("pixel_values" in inputs) == (len(prompt.tiles) > 0)
    if len(prompt.tiles):
        assert_same_tiles(inputs["pixel_values"], prompt.tiles, prompt.tile_valid_hw)


def test_a_batch_is_padded_on_the_left(pair):
    pair = pair()
    inputs = pair.inputs(*CONVERSATIONS.values())
    tiles = []
    for ids, mask, prompt in zip(
        inputs["input_ids"], inputs["attention_mask"], pair.prompts(*CONVERSATIONS.values()), strict=True
    ):
        np.testing.assert_array_equal(ids[mask.bool()], prompt.tokens)
        assert mask.tolist() == sorted(mask.tolist()) and (ids[~mask.bool()] == pair.chat.pad_id).all()
        tiles.append(prompt.tiles)
    assert len(inputs["pixel_values"]) == sum(map(len, tiles))


def test_text_rendered_first_and_tokenized_later_has_the_same_ids(pair):
    """The rendered text contains <|begin|>, and tokenizing must not add another."""
    pair, messages = pair(), CONVERSATIONS["image"]
    text = pair.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = pair.processor(text=text, images=messages[0]["content"][0]["image"], return_tensors="pt")
    np.testing.assert_array_equal(inputs["input_ids"][0], pair.prompts(messages)[0].tokens)


def test_mismatched_images_and_image_tokens_are_refused(pair):
    processor = pair().processor
    with pytest.raises(ValueError, match="2 image tokens .* for 1 images"):
        processor(text="<|image|><|image|>", images=random_image(0, 9, 9))
    with pytest.raises(ValueError, match="45 image tokens .* for 1 images: it already has one per visual token"):
        processor(text="<|image|>" * 45, images=random_image(0, 30, 50))
    with pytest.raises(ValueError, match="1 image tokens .* for 0 images"):
        processor(text="<|image|>")
    with pytest.raises(ValueError, match="nothing to process"):
        processor()
    with pytest.raises(ValueError, match="not videos"):
        processor(text="a", videos=["a.mp4"])
    with pytest.raises(ValueError, match="[Tt]runcat"):
        processor(text="<|image|>", images=random_image(0, 30, 50), truncation=True, max_length=8)


def test_tiling_options_can_be_passed_to_the_processor(pair):
    processor = pair().processor
    image = random_image(0, 30, 50)
    for settings, tiles in (({}, 5), ({"max_tiles": 1}, 1), ({"thumbnail": False}, 4)):
        inputs = processor(text="<|image|>", images=image, **settings)
        assert len(inputs["pixel_values"]) == tiles
        assert inputs["input_ids"][0].count(processor.image_token_id) == 9 * tiles
        counted = processor._get_num_multimodal_tokens(image_sizes=[(50, 30)], **settings)
        assert counted["num_image_patches"] == [tiles] and counted["num_image_tokens"] == [9 * tiles]


@pytest.mark.parametrize("rule", ["ovis", "internvl", "anyres_max_9"])
@pytest.mark.parametrize("max_tiles", [1, 5, 8, 21])
def test_vllm_reserves_memory_for_the_image_with_most_tokens(rule, max_tiles):
    """vLLM takes a size from the image processor: a square, its default, need not have the most tiles.

    Other images are then refused: "exceeds the pre-allocated encoder cache size" (vllm-project/vllm#34040).
    """
    processor = AlignVLMImageProcessor((3, 2), rule=rule, tile_size=24, max_tiles=max_tiles, grid_side=3)
    most = processor.num_visual_tokens(processor.size["height"], processor.size["width"])
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(1, 400, (60, 2)), *itertools.product((1, 23, 24, 25, 48, 72, 500), repeat=2)]
    assert most >= max(processor.num_visual_tokens(int(height), int(width)) for height, width in sizes)
    if rule != "anyres_max_9":
        assert most == 6 * (max_tiles + (max_tiles > 1))
        # vLLM takes the size from the folder, but counts with the options of the engine.
        size = processor.size["height"], processor.size["width"]
        assert [processor.plan(*size, max_tiles=n).num_tiles for n in (1, 2, 7, 30)] == [1, 3, 8, 31]
    assert "size" not in processor.to_dict()


def test_processor_options_that_vllm_uses(pair):
    """vLLM uses `return_mm_token_type_ids` up to transformers 5.14, `return_text_replacement_offsets` from 5.15 on."""
    pair = pair()
    pages = [random_image(1, 20, 10), random_image(2, 35, 20)]
    inputs = pair.processor(
        text="a<|image|>b<|image|>",
        images=pages,
        return_mm_token_type_ids=True,
        return_text_replacement_offsets=True,
        return_tensors="pt",
    )
    is_image = inputs["input_ids"] == pair.model.config.image_token_id
    assert (inputs["mm_token_type_ids"] == is_image.long()).all()
    counted = pair.processor._get_num_multimodal_tokens(image_sizes=[(p.height, p.width) for p in pages])
    assert counted["num_image_patches"] == [1, 3] and is_image.sum() == sum(counted["num_image_tokens"]) == 36
    assert inputs["image_grid_thw"].tolist() == [[1, 1, 1], [1, 1, 3]]  # Its product slices the tiles.
    (first, second) = inputs["text_replacement_offsets"][0]
    assert (first["type"], first["span"], first["text"]) == ("image", (1, 10), "<|image|>")
    assert first["replacement"] == "<|image|>" * 9 and second["replacement"] == "<|image|>" * 27
    text = "a" + first["replacement"] + "b" + second["replacement"]
    assert text[slice(*first["new_span"])] == first["replacement"]
    assert text[slice(*second["new_span"])] == second["replacement"]
    assert set(inputs) <= {
        "input_ids",
        "attention_mask",
        "pixel_values",
        "mm_token_type_ids",
        "text_replacement_offsets",
        "image_grid_thw",
    }
    assert pair.processor.image_token == "<|image|>" and pair.processor.image_token_id == pair.chat.image_id


def test_the_pipeline_gives_the_same_answer_as_the_model(pair, tmp_path):
    """The pipeline is called with a conversation that names an image file."""
    pair = pair("align", tied=False)
    (tmp_path / "page.png").write_bytes(unusual_images()["alpha"])
    parts = [{"type": "image", "path": str(tmp_path / "page.png")}, {"type": "text", "text": "What is the total?"}]
    messages = [{"role": "user", "content": parts}]
    pipe = transformers.pipeline("image-text-to-text", model=str(pair.folder), trust_remote_code=True, device="cpu")
    (answer,) = pipe(text=messages, max_new_tokens=8, do_sample=False, return_full_text=False)
    inputs = pair.inputs(messages)
    sequence = pair.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"] == pair.chat.decode(sequence) != ""


def test_code_files_need_only_torch_and_transformers(pair):
    """`trust_remote_code` requires all imports to be installed, and users do not have this package."""
    folder = pair().folder
    for name in REMOTE_CODE_FILES:
        imports = set(get_imports(folder / name)) - set(sys.stdlib_module_names)
        assert imports <= {"torch", "transformers", "numpy", "PIL"}, name
    program = """
import sys
for name in ("alignvlm_jax", "jax", "flax", "jaxtyping"):
    sys.modules[name] = None  # Makes `import name` fail.
import PIL.Image
import transformers
processor = transformers.AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = processor(text="<|image|>", images=PIL.Image.new("RGB", (30, 50)), return_tensors="pt")
print(model(**inputs).logits.shape)
"""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, folder], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 45, 352])" in done.stdout
