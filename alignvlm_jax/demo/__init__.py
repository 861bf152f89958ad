"""`alignvlm demo`: draws documents, trains a nano model on them and scores it.

    walkthrough.py    the steps of the demo, and what it prints
    corpus.py         the documents
    scoring.py        evaluations that are kept in files
    example.py        one page with its questions and answers

Every step writes its result to a file, so the demo can be interrupted and resumed.
"""

from alignvlm_jax.demo.corpus import draw_missing_corpus
from alignvlm_jax.demo.walkthrough import run

__all__ = ["draw_missing_corpus", "run"]
