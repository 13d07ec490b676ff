"""Dense matrix products of block-scaled FP8 numbers."""
