"""Comparison of more tokens than memory holds: exact sums, quantiles, matching by id, worst tokens."""
