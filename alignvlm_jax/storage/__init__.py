"""Access to buckets: their errors, and the checks before a run writes to one.

    errors.py    tells errors that pass from those that a person must fix
    access.py    checks that a bucket can be used, before any long work

`alignvlm_jax.locations` decides what is in a bucket, and opens it.
"""
