"""Analyses of trained models: robustness to noise, vocabulary, geometry and rare names.

Each analysis is a package with the same modules: `run.py` is the entry point of its `alignvlm analyze` command,
`measure.py` computes the results, and `report.py` turns them into JSON, plots and text.
"""
