"""The commands of `alignvlm`, a file each: what its help says, its arguments, and the call of the function that does
the work. jax and its friends are imported when a command runs, so that help and mistyped options answer at once."""
