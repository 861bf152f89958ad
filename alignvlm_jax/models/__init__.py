"""The networks, as Flax Linen modules. Nothing in this package reads or writes files."""
