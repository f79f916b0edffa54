"""What a training run will need and cost on chips that need not be there."""
