"""Published benchmarks: read, asked, scored.

table.py         one row a benchmark: its files, split, prompt, metric
question.py      what every reader yields and every metric takes
files.py         rows of JSON, JSON lines and Parquet; images in them
docdownstream.py documents.py chartqa.py textvqa.py ...     the formats, each with its layout in its docstring
scoring.py       which score each metric makes of the answers; the metrics themselves are evaluation/metrics
scores.py        sums, means and their intervals
predictions.py   the file of answers, gone on with after a stop
runner.py        `alignvlm eval --benchmark`
summary.py       the table that is printed, and the JSON
paper.py         the paper's scores
"""
