"""What a training step will cost in memory, told without running it, and what to freeze so that it costs less."""
