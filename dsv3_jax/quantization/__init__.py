"""Low-precision number formats in plain JAX: block-scaled FP8, LogFMT, Hopper's accumulator.

Formats only. Multiplications of these numbers live in `kernels`, and what is quantised where is
the model's choice.
"""
