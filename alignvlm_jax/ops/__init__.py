"""Numerical operations of the models: attention, ALIGN over the vocabulary, embedding lookup, and the loss."""

from alignvlm_jax.ops.attention import cached_attention, packed_attention
from alignvlm_jax.ops.linear_cross_entropy import linear_cross_entropy
from alignvlm_jax.ops.vocabulary_attention import VocabularySummary, vocabulary_attention, vocabulary_usage
from alignvlm_jax.ops.vocabulary_statistics import VocabularyStatistics, vocabulary_statistics
from alignvlm_jax.ops.vocabulary_streaming import VocabularyMesh

__all__ = [
    "VocabularyMesh",
    "VocabularyStatistics",
    "VocabularySummary",
    "cached_attention",
    "linear_cross_entropy",
    "packed_attention",
    "vocabulary_attention",
    "vocabulary_statistics",
    "vocabulary_usage",
]
