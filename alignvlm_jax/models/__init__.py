"""The networks, as pure Linen modules without any input or output."""
