"""Processor for AlignVLM: converts conversations and images to model inputs (`AutoProcessor` of an exported folder).

The chat template writes one image token per image. The processor repeats it once per visual token of the image:

    rendered   <|begin|><|user|><|image|>Total?<|assistant|>
    input_ids  <|begin|> <|user|> <|image|> <|image|> <|image|> Tot al ? <|assistant|>

The ids are the same as in training. No special token is added to the rendered template. Text typed by a user stays
text, even if it looks like a special token: the chat template marks it, and the tokenizer removes the marks.

Example of `processor_config.json`. The nested part belongs to the image processor; the tokenizer has its own files:

    {
      "processor_class": "AlignVLMProcessor",
      "auto_map": {"AutoProcessor": "processing_alignvlm.AlignVLMProcessor"},
      "tokens_per_tile": 729,
      "image_token": "<|image|>",
      "image_processor": {
        "image_processor_type": "AlignVLMImageProcessor",
        "auto_map": {"AutoImageProcessor": "image_processing_alignvlm.AlignVLMImageProcessor"},
        "rule": "ovis", "tile_size": 384, "max_tiles": 9, "thumbnail": true, "grid_side": 6, "token_grid": [27, 27]
      }
    }
"""

import re

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

# The imports of image_processing_alignvlm are repeated here: transformers 5.0 copies only the files that this file
# imports directly.
from .file_kinds_alignvlm import identify  # noqa: F401
from .image_processing_alignvlm import AlignVLMImagesKwargs, flatten_images
from .png_alignvlm import without_metadata  # noqa: F401
from .resampling_alignvlm import resample_images  # noqa: F401
from .rgb_alignvlm import to_rgb  # noqa: F401
from .samples_alignvlm import to_bytes  # noqa: F401
from .tiff_alignvlm import read_page  # noqa: F401
from .tiling_alignvlm import cut_tiles  # noqa: F401


class AlignVLMProcessorKwargs(ProcessingKwargs, total=False):
    """Keyword arguments of the processor and their defaults."""

    images_kwargs: AlignVLMImagesKwargs
    _defaults = {"text_kwargs": {"padding": True, "add_special_tokens": False}}


class AlignVLMProcessor(ProcessorMixin):
    """Wraps an image processor and a tokenizer into a single processor.

    Args:
        image_processor: an `AlignVLMImageProcessor`.
        tokenizer: a fast tokenizer.
        tokens_per_tile: number of visual tokens per tile.
        image_token: special token that marks the places of visual tokens.
        chat_template: Jinja template that renders a conversation.
    """

    valid_processor_kwargs = AlignVLMProcessorKwargs

    def __init__(
        self, image_processor=None, tokenizer=None, tokens_per_tile=1, image_token="<|image|>", chat_template=None
    ):
        self.tokens_per_tile = tokens_per_tile
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no image token {image_token!r}")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs) -> BatchFeature:
        """Cuts images into tiles, repeats the image tokens in the text, and tokenizes it.

        Args:
            images: images, paths or URLs, as a flat list or one list per text, in the order of the image tokens.
            text: one or several texts with one image token per image.
            videos: not supported.
            audio: not supported.
            **kwargs: arguments of the tokenizer (`padding`, `return_tensors`, ...) and of the image processor
                (`max_tiles`, ...).

        Returns:
            `input_ids`, `attention_mask` and, with images, `pixel_values`; under the tiling rule anyres_max_9 also
            `visual_sources` and `visual_weights`. On request `mm_token_type_ids` (1 at visual tokens) and
            `text_replacement_offsets`, the latter with `image_grid_thw`, [1, 1, tiles] for each image.

        Raises:
            ValueError: If there is nothing to process, or the numbers of image tokens and images differ.
        """
        if videos is not None or audio is not None:
            raise ValueError("this model supports text and images, but not videos or audio")
        if text is None and images is None:
            raise ValueError("nothing to process: pass `text`, `images` or both")
        # Both options may be passed as a keyword or in `text_kwargs`.
        return_types = kwargs.pop("return_mm_token_type_ids", False)
        return_offsets = kwargs.pop("return_text_replacement_offsets", False)
        merged = self._merge_kwargs(AlignVLMProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs = merged["text_kwargs"]
        return_types = text_kwargs.pop("return_mm_token_type_ids", False) or return_types
        return_offsets = text_kwargs.pop("return_text_replacement_offsets", False) or return_offsets
        return_tensors = text_kwargs.pop("return_tensors", None)

        # Cut the images into tiles; `counts` is the number of visual tokens of each image.
        data, counts = {}, []
        images = None if images is None else list(flatten_images(images))
        if images:
            images_kwargs = {**merged["images_kwargs"], "return_tensors": None}
            data = dict(self.image_processor(images, **images_kwargs))
            num_tiles = data.pop("num_tiles")
            counts = data.pop("num_visual_tokens", num_tiles * self.tokens_per_tile).tolist()
        if text is None:
            return BatchFeature(data, tensor_type=return_tensors)

        # Write one image token per visual token, then tokenize.
        texts = [text] if isinstance(text, str) else list(text)
        texts, offsets = self._repeat_image_tokens(texts, counts)
        text_inputs = self.tokenizer(texts, **text_kwargs)
        if return_types:
            text_inputs["mm_token_type_ids"] = [
                [int(i == self.image_token_id) for i in ids] for ids in text_inputs["input_ids"]
            ]
        self._check_special_mm_tokens(texts, text_inputs, modalities=["image"])
        features = BatchFeature({**text_inputs, **data}, tensor_type=return_tensors)
        if return_offsets:
            features["text_replacement_offsets"] = offsets
        if return_offsets and images:
            # vLLM asks for the offsets. Without a grid, it counts the tiles again, without this call's options.
            grid = np.stack([np.ones_like(num_tiles), np.ones_like(num_tiles), num_tiles], axis=1)
            features.update(BatchFeature({"image_grid_thw": grid}, tensor_type=return_tensors))
        return features

    def _repeat_image_tokens(self, texts: list[str], counts: list[int]) -> tuple[list[str], list[list[dict]]]:
        """Repeats the image tokens once per visual token; also returns the replacements in transformers' format."""
        num_image_tokens = sum(text.count(self.image_token) for text in texts)
        if num_image_tokens != len(counts):
            hint = ""
            if counts and num_image_tokens == sum(counts):
                hint = ": it already has one per visual token; pass one per image, which this processor repeats"
            raise ValueError(
                f"the text has {num_image_tokens} image tokens ({self.image_token}) for {len(counts)} images{hint}"
            )
        remaining = iter(counts)
        expanded, offsets = [], []
        for text in texts:
            # `shift` is the difference between a position in the expanded text and in the original.
            pieces, spans, start, shift = [], [], 0, 0
            for match in re.finditer(re.escape(self.image_token), text):
                replacement = self.image_token * next(remaining)
                new_start = match.start() + shift
                spans.append(
                    {
                        "type": "image",
                        "span": match.span(),
                        "new_span": (new_start, new_start + len(replacement)),
                        "text": self.image_token,
                        "replacement": replacement,
                    }
                )
                pieces += [text[start : match.start()], replacement]
                start, shift = match.end(), shift + len(replacement) - len(self.image_token)
            expanded.append("".join([*pieces, text[start:]]))
            offsets.append(spans)
        return expanded, offsets

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Returns the replacement of an image token; called by transformers and vLLM."""
        if "num_visual_tokens" in image_inputs:
            return self.image_token * int(image_inputs["num_visual_tokens"][image_idx])
        return self.image_token * (int(image_inputs["num_tiles"][image_idx]) * self.tokens_per_tile)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Returns the numbers of visual tokens and tiles of images of the given (height, width) sizes.

        vLLM uses them to reserve memory.
        """
        if image_sizes is None:
            return MultiModalData()
        overrides = {**kwargs, **(kwargs.get("images_kwargs") or {})}
        tiles = [self.image_processor.plan(height, width, **overrides).num_tiles for height, width in image_sizes]
        if self.image_processor.rule == "anyres_max_9":
            tokens = [self.image_processor.num_visual_tokens(*size, **overrides) for size in image_sizes]
        else:
            tokens = [count * self.tokens_per_tile for count in tiles]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=tiles)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model inputs that the processor returns."""
        joined = ["visual_sources", "visual_weights"] if self.image_processor.rule == "anyres_max_9" else []
        return ["input_ids", "attention_mask", "pixel_values", *joined]


__all__ = ["AlignVLMProcessor"]
