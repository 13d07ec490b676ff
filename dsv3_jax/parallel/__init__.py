"""Meshes, shard_map helpers and collectives; the planners here know no JAX."""
