"""Generation with a PyTorch AlignVLM: what differs from transformers' own because of the images.

- Images belong to the prompt: tiles or visual tokens are only passed with it.
- A beam or a sample repeats the tiles of its row.
- Image tokens are never proposed by prompt lookup, which copies from the prompt, or by an assistant: each one in the
  text needs a visual token.
- A model that drafts tokens (`assistant_model`) sees the images through its own encoder and connector, or not at all.
"""

import torch
from transformers.generation import GenerationMixin


class AlignVLMGenerationMixin(GenerationMixin):
    """Generation from text and images; the class that uses it has `config` and `model`."""

    def generate(self, *args, assistant_model=None, **kwargs):
        """Extends transformers' method: an assistant gets the images in the form that it understands."""
        if assistant_model is not None:
            names = ("pixel_values", "visual_sources", "visual_weights")
            images = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            kwargs["assistant_model"] = _Assistant(assistant_model, images)
        return super().generate(*args, **kwargs)

    def _get_candidate_generator(self, *args, **kwargs):
        """Returns transformers' generator of candidates, which ends them before an image token."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        propose = generator.get_candidates

        def get_candidates(input_ids: torch.LongTensor, *args, **kwargs):
            ids, logits = propose(input_ids, *args, **kwargs)
            length = input_ids.shape[1]
            is_image = (ids[0, length:] == self.config.image_token_id).nonzero()
            if len(is_image):
                count = int(is_image[0, 0])
                ids, logits = ids[:, : length + count], logits[:, :count] if logits is not None and count else None
            return ids, logits

        generator.get_candidates = get_candidates
        return generator

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        """Prepares the inputs of a decoding step; images are only passed with the prompt."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            **if_given(past_key_values=past_key_values),
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        images = ("pixel_values", "mm_encoder_outputs", "visual_sources", "visual_weights")
        # In later steps, the visual tokens are in the cache. For an assistant, no step counts as the first one, but its
        # cache is empty at the prompt. It is never a static cache, whose length would have to be read from the GPU.
        cache = kwargs.get("cache") if past_key_values is None else past_key_values
        is_static = getattr(cache, "is_compileable", False)
        if is_first_iteration or not kwargs.get("use_cache", True) or not is_static and is_empty(cache):
            inputs |= {name: kwargs[name] for name in images if kwargs.get(name) is not None}
        else:
            for name in images:
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, pixel_values=None, **model_kwargs
    ):
        """Repeats rows for beams in place (a a b b), together with the tiles of each row (a1 a2 a1 a2 b1 b1)."""
        joined = {name: model_kwargs.pop(name) for name in ("visual_sources", "visual_weights") if name in model_kwargs}
        if pixel_values is not None and expand_size > 1:
            is_image = input_ids == self.config.image_token_id
            if joined:
                tokens = is_token(joined["visual_weights"]).sum(dim=-1).to(input_ids.device)
            else:
                tokens = torch.full((len(pixel_values),), self.config.tokens_per_tile, device=input_ids.device)
            check_counts(is_image, int(tokens.sum()))
            # A row has the tiles up to the one with its last visual token.
            ends = torch.searchsorted(tokens.cumsum(dim=0), is_image.sum(dim=-1).cumsum(dim=0), right=True)
            sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()

            def expand(tiles):
                return torch.cat([part for part in tiles.split(sizes) for _ in range(expand_size)])

            pixel_values = expand(pixel_values)
            joined = {name: expand(tiles) for name, tiles in joined.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, {**model_kwargs, **joined}


class _Assistant:
    """A model that drafts tokens for another one; its visual tokens are its own.

    transformers passes an assistant the visual tokens of the main model, which have another width and meaning.

    Args:
        model: the assistant, an AlignVLM or a plain language model.
        images: the main model's inputs for images.
    """

    def __init__(self, model, images: dict[str, torch.Tensor]):
        self._model = model
        self._images = {}
        if images and hasattr(model, "get_image_features"):
            with torch.no_grad():
                images = {name: value.to(model.device) for name, value in images.items()}
                encoded = model.get_image_features(**images, return_dict=True)
            self._images["mm_encoder_outputs"] = {"image": encoded}

    def __getattr__(self, name):
        return getattr(self._model, name)

    def generate(self, *args, **kwargs):
        """Drafts tokens."""
        for name in ("pixel_values", "visual_sources", "visual_weights", "mm_encoder_outputs"):
            kwargs.pop(name, None)
        return self._model.generate(*args, **kwargs, **self._images)


def is_empty(cache) -> bool:
    """Returns whether a cache is known to be empty."""
    # Under torch.compile, the length of a static cache is a tensor, which must not decide a branch.
    return cache is None or (not torch.compiler.is_compiling() and int(cache.get_seq_length()) == 0)


def if_given(**argument) -> dict:
    """Returns the argument as keywords, without None.

    From transformers 5.24 on, `past_key_values` is called `cache` and arrives in `kwargs`.
    """
    return {name: value for name, value in argument.items() if value is not None}


def check_counts(is_image: torch.Tensor, num_visual: int) -> None:
    """Raises a `ValueError` unless there is one image token per visual token."""
    # The check would need a device synchronization, which breaks the graph under torch.compile.
    if torch.compiler.is_compiling():
        return
    num_image_tokens = int(is_image.sum())
    if num_image_tokens != num_visual:
        raise ValueError(
            f"the text has {num_image_tokens} image tokens for {num_visual} visual tokens: use the processor of the "
            "same folder, and do not truncate its output"
        )


def is_token(weights: torch.Tensor) -> torch.Tensor:
    """Returns which slots [M, K] of `visual_weights` have a visual token."""
    return (weights != 0).any(dim=-1)
