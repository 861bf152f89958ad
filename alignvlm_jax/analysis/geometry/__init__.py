"""Geometry: the position of visual tokens relative to the text embeddings and to their convex hull.

ALIGN's tokens are mixtures of text embeddings and therefore lie in their convex hull; an MLP's tokens may lie anywhere.
The analysis does not assume this but measures it, in the same way for every connector, by the distance to the nearest
text embedding and to the hull.
"""
