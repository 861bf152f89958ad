"""The networks: Linen modules that neither read nor write files."""
