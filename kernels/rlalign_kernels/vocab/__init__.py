"""``linear_logprob`` and ``linear_sample`` on a GPU. Import the public operators, not this."""
