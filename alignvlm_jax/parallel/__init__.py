"""Where arrays live: the device mesh and the rules that lay arrays out on it."""
