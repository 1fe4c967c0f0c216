"""Generating images with a pipeline."""
