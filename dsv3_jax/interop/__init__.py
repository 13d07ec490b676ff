"""Published weights in, trained weights out: checkpoints of the deepseek_v3 family."""
