"""dsv3_jax: DeepSeek-V3 in JAX, and the hardware co-design its paper describes.

    import dsv3_jax as ds

    config = ds.load_config("tiny").model
    variables = ds.init(jax.random.key(0), config)
    logits = ds.forward(variables, tokens, config).logits

`ds.NAME` is the public surface: `__all__`, `dir(ds)` and docs/api.md list it, from one list in
__init__.pyi. A name is imported when it is first asked for, so that `import dsv3_jax` alone imports
neither JAX nor anything else of the package.

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

import ast as _ast
from importlib import import_module as _import_module
from pathlib import Path as _Path

__version__ = "0.1.0"

# The module of each name, and its name there: type checkers and editors read the same list.
_HOMES = {
    alias.asname or alias.name: (node.module or "", alias.name)
    for node in _ast.parse(_Path(__file__).with_suffix(".pyi").read_text()).body
    if isinstance(node, _ast.ImportFrom)
    for alias in node.names
}
__all__ = [*sorted(_HOMES), "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}: dir() lists its names"
        )
    module, there = _HOMES[name]
    found = globals()[name] = getattr(_import_module(module), there)
    return found


def __dir__() -> list[str]:
    return __all__
