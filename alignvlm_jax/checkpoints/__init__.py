"""Writes, verifies, finds and restores the checkpoints of a run.

    workdir.py                        layout of a run's folder; finds the checkpoints in it
    checkpointer.py, retention.py     saves and restores training states, and deletes old ones
    weights.py                        reads and writes weights without an optimizer
    arrays.py, staging.py             trees of arrays, with Orbax; to S3 through a disk
    integrity.py, step_files.py       digests that reveal incomplete and damaged checkpoints; uploads.py adds to them
    provenance.py, exported.py, new_folder.py     versions, exported folders, all-or-nothing writes

The packages `training`, `inference`, `evaluation` and `interop` import this one; it imports none of them.
"""
