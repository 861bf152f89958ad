"""From documents to packed batches: drawing, storing, tiling, tokenizing, packing. Nothing here knows of models."""
