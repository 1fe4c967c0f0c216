"""The shard format: plain WebDataset tars with a sidecar index each, and a manifest for the set.

This package reads and writes the format and knows nothing about models or training. It never imports `pipeline`, so it
can be used alone by programs that only want the data. See README.md for the format.
"""
