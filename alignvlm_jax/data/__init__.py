"""Data pipeline: from documents to packed batches.

Examples are ordered, read from disk, tokenized, cut into tiles and packed. This package does not depend on the models.
"""
