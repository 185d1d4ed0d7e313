"""Norms, rotary embedding and activations on a GPU: the "triton" backends of norm, layer_norm, rope and activation."""
