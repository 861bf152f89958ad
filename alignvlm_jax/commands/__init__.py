"""The commands of `alignvlm`, one per module: help text, arguments, and the call of the function that does the work.

JAX and other large packages are imported when a command runs, so that help and errors in options appear at once.
"""
