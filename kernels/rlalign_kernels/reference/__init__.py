"""The invariant float path in PyTorch: plans by their defining schedule, and by faster ones a probe has proven equal."""
