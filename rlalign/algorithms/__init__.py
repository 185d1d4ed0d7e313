"""What turns rewards into a gradient: pure functions on torch tensors, one algorithm per file."""
