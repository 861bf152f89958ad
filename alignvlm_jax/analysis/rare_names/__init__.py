"""Rare names: whether they are read as more common ones, and which part of the model is responsible.

The corpus comes from `data/synthetic/names.py`. The rarity of its names is drawn at random, and nothing else differs
between rare and common names, so any difference between the answers is an effect of rarity.
"""
