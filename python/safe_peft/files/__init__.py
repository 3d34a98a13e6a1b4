"""Files that survive a crash: JSON files replaced atomically, and complete checkpoints."""
