"""Text to rows of tokens, without JAX.

Documents are read (`documents`), turned into tokens with FIM and split (`packing`), written once as
memory-mapped shards (`shards`, `corpus`), and cut into rows that are a pure function of (seed, row
number) (`batches`). There is no state but the step, so a resume, another number of hosts or another
mesh sees the same global batch.
"""
