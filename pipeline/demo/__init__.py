"""The bundled demo: captioned scenes, the oracle that judges them, and code that trains a teacher on them."""
