"""Comparing a student with its teacher: cost, fidelity, quality and the model card."""
