"""State, step, optimizer, checkpoints and the loop."""
