"""Converting pipelines to the formats of other programs."""
