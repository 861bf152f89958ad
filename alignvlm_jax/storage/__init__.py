"""Access to buckets: their objects, their errors, and the checks before a run writes to one.

    clients.py       the clients of the stores
    objects.py       lists and deletes objects, with the checksums that the store keeps of them
    versioned.py     replaces an object only if nobody else has
    text_files.py    text files that a run replaces or extends, on a disk or in a bucket
    transfer.py      uploads files
    errors.py        tells errors that pass from those that a person must fix
    access.py        checks that a bucket can be used, before any long work

`alignvlm_jax.locations` decides what is in a bucket, and opens it.
"""
