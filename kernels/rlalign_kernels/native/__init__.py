"""What PyTorch picks: fast, differentiable, and not invariant. For comparison only."""
