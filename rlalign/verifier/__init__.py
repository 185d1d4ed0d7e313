"""Rollout log-probs against train log-probs: bit comparison, metrics, worst tokens, and what to do about them."""
