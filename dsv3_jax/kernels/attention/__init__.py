"""Causal attention for training and prefill: output and log-sum-exp, with a backward pass."""
