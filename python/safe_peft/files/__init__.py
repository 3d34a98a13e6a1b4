"""Files that survive a crash: strict JSON, checksums, whole checkpoints."""
