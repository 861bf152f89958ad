"""Published benchmarks: readers of their files, prompts, scores and the comparison with the paper.

table.py         one row per benchmark: files, split, prompt and metric
question.py      the common form of a question, between the file readers and the metrics
layout.py        a published form of a benchmark: expected files and their reader
files.py         rows of JSON, JSON lines and Parquet files, and their images
reading.py       the folder and the layout that a benchmark is in, and its questions
docdownstream.py documents.py chartqa.py textvqa.py ...     file formats, each described in its module docstring
scoring.py       scores of all answers to a benchmark, built on the metrics in evaluation/metrics
scores.py        means, ratios and their confidence intervals
predictions.py   the file of answers, from which a stopped run resumes
runner.py        `alignvlm eval --benchmark`
outcome.py       the result of one benchmark
summary.py       the printed table and the JSON file
paper.py         the scores in the paper
"""
