"""Predicts the memory of a training step without running it, and chooses what to freeze so that a step fits."""
