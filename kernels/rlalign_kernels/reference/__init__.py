"""The invariant float path in PyTorch: each plan by its defining schedule, or a faster one proven equal by a probe."""
