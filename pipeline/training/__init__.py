"""Training a student from entries."""
