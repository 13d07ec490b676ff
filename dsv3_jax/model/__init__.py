"""The model: MLA, MoE and MTP as plain functions of arrays, owned by thin Flax (Linen) modules."""
