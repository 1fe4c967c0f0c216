"""The shard format: plain WebDataset tars with a sidecar index each, and a manifest for the set.

This package reads and writes that format and knows nothing of models or training. It never imports
`pipeline`, so that somebody who only wants the data can use it alone.
"""
