"""dsv3_jax: DeepSeek-V3 in JAX, and the hardware co-design its paper describes.

Shape letters, the same in every signature, einsum and local-variable suffix of the model rooms:

    B batch          T query length   S key length     D model (hidden_size)
    N heads          H nope head dim  R rope head dim  U value head dim
    Q query latent   C kv latent      F expert hidden  E experts
    K experts/token  G expert groups  V vocabulary     L layers

T also counts tokens once the batch is folded in. In `kernels/` the letters are those of GEMM:
M rows, N columns, K the contracted dimension, G groups.

"axis" is a mesh axis, "dim" a tensor dimension. Weights are stored as in the published checkpoints,
[out, in]: the contracted dimension is last, which is also the only layout FP8 tensor cores read.
"""

__version__ = "0.1.0"
