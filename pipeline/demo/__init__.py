"""The bundled demo: captioned scenes, the oracle that judges them, and a teacher trained on them."""
