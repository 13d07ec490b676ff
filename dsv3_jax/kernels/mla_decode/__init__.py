"""Attention of a few new tokens over a paged cache of latents (MLA, absorbed form)."""
