"""`alignvlm reproduce`: the paper's comparison of connectors at a scale that two CPU cores train in minutes a run.

options.py      what is asked for: which parts, how many seeds, how many minutes a run may take
jobs.py         a job: one run of one connector, with a folder of its own; `parts/` list them
recipe.py       what a job trains: `configs/reproduce.py` with the job's connector, encoder, seed and share of data
work.py         doing one job: train, resume, stop at the cap, score
worker.py       the process that does it
scheduler.py    doing all of them, so many at once; stopped and continued at any time
parts/          one file for each part of the report: its jobs, what they measure, its section
statistics.py   means and intervals over seeds and questions
report.py       report.md and the plots, from nothing but the jobs' result.json
"""
