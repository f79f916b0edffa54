"""PyTorch checkpoints to ours and back, and the export of packed models."""
