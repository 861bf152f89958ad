"""`alignvlm reproduce`: the paper's comparison of connectors, at a scale that two CPU cores train in minutes per run.

options.py      options of the command: parts, number of seeds, minutes per run
jobs.py         a job: one run of one connector, with its own folder; `parts/` list the jobs
recipe.py       what a job trains: `configs/reproduce.py` with the job's connector, encoder, seed and share of the data
work.py         runs one job: trains, resumes, stops at the time limit, scores
worker.py       the process that runs a job
scheduler.py    runs all jobs, several at once; can be stopped and resumed at any time
parts/          one file for each part of the report: its jobs, what they measure, and its section
statistics.py   means and intervals over seeds and questions
report.py       writes report.md and the plots from the result.json files of the jobs
"""
