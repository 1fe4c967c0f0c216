"""The mathematics: pure functions of arrays and tensors, without I/O."""
