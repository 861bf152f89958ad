"""Outputs of the PyTorch AlignVLM.

While a model trains, its output has no logits yet. The loss needs only those before a label, and the complete logits
[B, L, V] of thousands of visual tokens would be the largest tensor of a step. But some trainers read `outputs.logits`
for their statistics, such as TRL 1.0. `AlignVLMTrainingOutput` computes them when they are read.
"""

import dataclasses
from collections.abc import Callable

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclasses.dataclass
class AlignVLMModelOutput(BaseModelOutputWithPast):
    """Output of `AlignVLMModel`.

    Attributes:
        image_hidden_states: the visual tokens, [M, N', D], or [T, 1, D] if tiles are joined.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclasses.dataclass
class AlignVLMCausalLMOutput(CausalLMOutputWithPast):
    """Output of `AlignVLMForConditionalGeneration`.

    Attributes:
        image_hidden_states: the visual tokens, [M, N', D], or [T, 1, D] if tiles are joined.
    """

    image_hidden_states: torch.Tensor | None = None


class DelayedLogits:
    """Logits that are not computed yet.

    They are neither a tensor nor a container, so that wrappers of a model pass them on: accelerate, which converts
    outputs to float32, and DistributedDataParallel.

    Args:
        head: the language-model head.
        hidden: [B, L, D] hidden states.
    """

    def __init__(self, head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor):
        self._head, self._hidden = head, hidden
        # Logits are read outside of the trainer's autocast, but the head may need it.
        self._autocast = torch.is_autocast_enabled(hidden.device.type)
        self._dtype = torch.get_autocast_dtype(hidden.device.type)

    def compute(self) -> torch.Tensor:
        """Returns the logits [B, L, V]; they have a gradient if the caller has not disabled gradients."""
        with torch.autocast(self._hidden.device.type, self._dtype, enabled=self._autocast):
            return self._head(self._hidden)


@dataclasses.dataclass
class AlignVLMTrainingOutput(AlignVLMCausalLMOutput):
    """Output of a training step. Its logits are computed when they are read for the first time.

    They then follow from the weights of that moment, so they must be read before the optimizer's step.
    """

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if name == "logits" and isinstance(value, DelayedLogits):
            value = value.compute()
            self.logits = value
        return value

    def __getitem__(self, key):
        # ModelOutput would read every value for a single position.
        if isinstance(key, int):
            key = list(self.keys())[key]
        return self.logits if key == "logits" else super().__getitem__(key)

    def get(self, key, default=None):
        """Returns the value of a key, or `default`."""
        return self[key] if key in self else default
