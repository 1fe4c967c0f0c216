"""The commands beside the three stages, one module each."""
