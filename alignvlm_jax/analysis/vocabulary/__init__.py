"""Vocabulary use of ALIGN: the words that it uses, and how many of them it can do without.

The paper (arXiv 2502.01341) averages P over the patches of 100 document images. The most probable word has 0.0118,
about 3.4K of 128K words carry the mass, and a model pruned to those words scores 0.12 points less.

Words should be chosen on other pages than the scored pages: `run.py` chooses them on the train split.
"""
