"""The commands besides the three stages, one module each."""
