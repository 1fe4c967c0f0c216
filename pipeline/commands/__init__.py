"""The work of the commands, one module each. Their options are in pipeline/settings."""
