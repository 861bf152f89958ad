"""Keeps each output to one writer: a workdir, an export, a data set, a file of predictions.

    one_writer.py     takes the lease of an output: chooses the kind by where the output is
    lease.py          what a lease is, and its errors
    local_lock.py     on a local disk: a lock of the operating system
    lease_file.py     on storage that several hosts share: a file that is renewed, and expires
    lease_object.py   in a bucket: an object that is renewed, and expires
    renewed.py        what the last two have in common
    file_systems.py   tells local disks from shared storage
    holder.py         who holds a lease, and for which job

Only writers take a lease. Readers, such as `eval` and `ask` on the workdir of a running training, need none.
"""
