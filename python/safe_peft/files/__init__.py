"""Files that survive a crash: JSON that is replaced whole, checkpoints that are whole."""
