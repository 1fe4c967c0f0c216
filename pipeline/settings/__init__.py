"""The options of the commands. Nothing here imports torch, so that `--help` and a typo are answered at once."""
