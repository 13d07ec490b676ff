"""Quantisation fused with what comes before it, so that each input is read once."""
