"""The one table of weights: a row for every parameter, and all that is said of it.

Where a weight lies on a mesh, weight decay, which weights are held in FP8, published names and
parameter counts are read from here, so that adding a weight is adding a row (and a line in the
module that multiplies with it). Nothing here knows JAX.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from dsv3_jax.config.model import ModelConfig

Where = Literal["model", "layer", "dense", "moe", "mtp"]
Part = Literal[
    "embedding",
    "head",
    "attention",
    "dense_ffn",
    "routed_experts",
    "shared_experts",
    "router",
    "norms",
    "mtp",
]

# What a letter is cut over, in a row that cuts it: a logical dim of parallel/sharding.py.
CUT_OVER = {"V": "vocab", "N": "heads", "I": "mlp", "SF": "mlp", "E": "expert"}


@dataclass(frozen=True, eq=False)
class Weight:
    """One row: a parameter of ours, as it is in one layer.

    Fields:
        path: of the leaf in {"params", "router"}; {block} stands for dense_layers, moe_layers or
            mtp_0/block, {depth} for an MTP module's number.
        hf: the published names of the matrices that it is made of, one, or gate and up; {layer}
            counts the main layers, then the MTP modules.
        shape: its dims in the letters of `sizes`; what is in brackets is one dim of the published
            matrix. The matrix is the last two dims, those before it count experts and the pair.
        where: once in the "model", in every "layer", in "dense", "moe" or "mtp" layers.
        part: what it is counted as.
        cut: the letter of the dim that a mesh cuts (CUT_OVER says over what); "" for none: every
            device has all of it.
        fp8: published in FP8 by V3, held in FP8 for inference, multiplied in FP8 to train
            (V3 report, section 3.3.1).
        decayed: weight decay applies to it.
        init: how it starts: normal with std initializer_range, ones or zeros.
        when: whether a model has it.
        copy: the same numbers as another row's, which publishers store twice; no leaf of ours.
    """

    path: str
    hf: tuple[str, ...]
    shape: str
    where: Where
    part: Part
    cut: str = ""
    fp8: bool = False
    decayed: bool = True
    init: Literal["normal", "ones", "zeros"] = "normal"
    when: Callable[[ModelConfig], bool] = lambda config: True
    copy: bool = False

    @functools.cached_property
    def name(self) -> str:
        """The leaf's own name."""
        return self.path.split("/")[-1]

    @functools.cached_property
    def collection(self) -> str:
        """The collection of variables: "params", or "router" for what no gradient trains."""
        return self.path.split("/")[0]

    @functools.cached_property
    def module(self) -> tuple[str, ...]:
        """The modules it lies in, from the block or the MTP module on; () for the model's own."""
        return tuple(name for name in self.path.split("/")[1:-1] if not name.endswith("}"))

    @functools.cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Its letters, those of one published dim together."""
        found = re.findall(r"[^()\s]+|\([^)]*\)", self.shape)
        return tuple(tuple(group.strip("()").split()) for group in found)

    @functools.cached_property
    def letters(self) -> tuple[str, ...]:
        """One letter for each dim."""
        return tuple(letter for group in self.groups for letter in group)

    @functools.cached_property
    def lead(self) -> tuple[str, ...]:
        """The letters before the matrix: experts, the pair of gate and up."""
        return tuple(letter for group in self.groups[:-2] for letter in group)

    @functools.cached_property
    def matrix(self) -> tuple[tuple[str, ...], ...]:
        """The letters of the published matrix, (rows, columns), or of a vector, (numbers,)."""
        return self.groups[-2:]

    @property
    def is_matrix(self) -> bool:
        """Whether something is multiplied with it, or looked up in it; norms and biases are not."""
        return len(self.matrix) == 2

    @property
    def of_expert(self) -> bool:
        """Whether each routed expert has its own."""
        return self.lead[:1] == ("E",)

    @functools.cached_property
    def dims(self) -> tuple[str | None, ...]:
        """The logical dim of each of its dims; None for one that no mesh axis cuts."""
        return tuple(CUT_OVER[x] if x == self.cut else None for x in self.letters)

    def dims_of(self, config: ModelConfig) -> tuple[int, ...]:
        """The sizes of its dims, in one layer."""
        return tuple(_size(letter, config) for letter in self.letters)

    def size(self, config: ModelConfig) -> int:
        """How many numbers it has, in one layer."""
        return math.prod(self.dims_of(config))

    def count(self, config: ModelConfig) -> tuple[int, int]:
        """How many times the main model has it, and how many times all MTP modules together."""
        mtp = config.num_nextn_predict_layers
        return {
            "model": (1, 0),
            "layer": (config.num_hidden_layers, mtp),
            "dense": (config.num_dense_layers, 0),
            "moe": (config.num_moe_layers, mtp),
            "mtp": (0, mtp),
        }[self.where]


def _compressed(config: ModelConfig) -> bool:
    return config.q_lora_rank is not None


def _uncompressed(config: ModelConfig) -> bool:
    return config.q_lora_rank is None


def _shared(config: ModelConfig) -> bool:
    return config.n_shared_experts > 0


def _biased(config: ModelConfig) -> bool:
    return config.has_router_bias


_P, _MTP = "params/{block}/", "params/mtp_{depth}/"
_ATTN, _FFN, _EXPERTS, _SHARED = (
    _P + module for module in ("self_attn/", "mlp/", "mlp/experts/", "mlp/shared_experts/")
)


def _hf(*names: str) -> tuple[str, ...]:
    return tuple("model.layers.{layer}." + name for name in names)


def _ffn(path: str, width: str, where: Where, part: Part, **of_all) -> tuple[Weight, Weight]:
    """The rows of a SwiGLU feed-forward, [(E) 2 F D] and [(E) D F]."""
    lead, cut, hf = "", width, path.removeprefix(_P).replace("/", ".")
    if part == "routed_experts":
        lead, cut, hf = "E ", "E", hf + "{expert}."
    of_all = {"fp8": True, "cut": cut, **of_all}
    gate_up = _hf(hf + "gate_proj.weight", hf + "up_proj.weight")
    down = _hf(hf + "down_proj.weight")
    return (
        Weight(path + "gate_up_proj", gate_up, f"{lead}2 {width} D", where, part, **of_all),
        Weight(path + "down_proj", down, f"{lead}D {width}", where, part, **of_all),
    )


_Norm = functools.partial(Weight, decayed=False, init="ones")
_Fp8 = functools.partial(Weight, fp8=True)
_Copy = functools.partial(Weight, copy=True)

# In each module's order of creation, which its random numbers depend on.
# fmt: off
WEIGHTS: tuple[Weight, ...] = (
    Weight("params/embed_tokens", ("model.embed_tokens.weight",), "V D", "model", "embedding", "V"),
    _Norm("params/norm", ("model.norm.weight",), "D", "model", "norms"),
    Weight("params/lm_head", ("lm_head.weight",), "V D", "model", "head", "V"),

    _Norm(_P + "input_layernorm", _hf("input_layernorm.weight"), "D", "layer", "norms"),
    _Norm(_P + "post_attention_layernorm", _hf("post_attention_layernorm.weight"),
          "D", "layer", "norms"),
    _Fp8(_ATTN + "q_proj", _hf("self_attn.q_proj.weight"),
         "(N HR) D", "layer", "attention", "N", when=_uncompressed),
    _Fp8(_ATTN + "q_a_proj", _hf("self_attn.q_a_proj.weight"),
         "Q D", "layer", "attention", when=_compressed),
    _Norm(_ATTN + "q_a_layernorm", _hf("self_attn.q_a_layernorm.weight"),
          "Q", "layer", "attention", when=_compressed),
    _Fp8(_ATTN + "q_b_proj", _hf("self_attn.q_b_proj.weight"),
         "(N HR) Q", "layer", "attention", "N", when=_compressed),
    _Fp8(_ATTN + "kv_a_proj_with_mqa", _hf("self_attn.kv_a_proj_with_mqa.weight"),
         "CR D", "layer", "attention"),
    _Norm(_ATTN + "kv_a_layernorm", _hf("self_attn.kv_a_layernorm.weight"),
          "C", "layer", "attention"),
    _Fp8(_ATTN + "kv_b_proj", _hf("self_attn.kv_b_proj.weight"),
         "(N HU) C", "layer", "attention", "N"),
    _Fp8(_ATTN + "o_proj", _hf("self_attn.o_proj.weight"),
         "D (N U)", "layer", "attention", "N"),

    *_ffn(_FFN, "I", "dense", "dense_ffn"),

    Weight(_FFN + "gate", _hf("mlp.gate.weight"), "E D", "moe", "router"),
    Weight("router/{block}/mlp/e_score_correction_bias", _hf("mlp.gate.e_score_correction_bias"),
           "E", "moe", "router", decayed=False, init="zeros", when=_biased),
    *_ffn(_EXPERTS, "F", "moe", "routed_experts"),
    *_ffn(_SHARED, "SF", "moe", "shared_experts", when=_shared),

    _Norm(_MTP + "enorm", _hf("enorm.weight"), "D", "mtp", "norms"),
    _Norm(_MTP + "hnorm", _hf("hnorm.weight"), "D", "mtp", "norms"),
    Weight(_MTP + "eh_proj", _hf("eh_proj.weight"), "D 2D", "mtp", "mtp"),
    _Norm(_MTP + "norm", _hf("shared_head.norm.weight"), "D", "mtp", "norms"),
    _Copy("params/embed_tokens", _hf("embed_tokens.weight"), "V D", "mtp", "embedding"),
    _Copy("params/lm_head", _hf("shared_head.head.weight"), "V D", "mtp", "head"),
)
# fmt: on

_added: tuple[Weight, ...] = ()


def table() -> tuple[Weight, ...]:
    """All rows: WEIGHTS, and those of an `extended` that is entered."""
    return WEIGHTS + _added


@contextmanager
def extended(*rows: Weight) -> Iterator[None]:
    """The table with more rows, for as long as the `with` lasts: a variant tried from outside.

    A function that was traced before knows nothing of them.
    """
    global _added
    before = _added
    _added = before + rows
    try:
        yield
    finally:
        _added = before


def weights(config: ModelConfig, *, copies: bool = False) -> tuple[Weight, ...]:
    """The rows that a model of this config has; with copies also those stored twice."""
    return _weights(config, copies, table())


@functools.lru_cache(maxsize=64)
def _weights(config: ModelConfig, copies: bool, rows: tuple[Weight, ...]) -> tuple[Weight, ...]:
    kept = (row for row in rows if copies or not row.copy)
    return tuple(row for row in kept if row.when(config) and any(row.count(config)))


def find_weight(path: Sequence[str]) -> Weight | None:
    """The row of a leaf, recognised by the end of its path; None for what is no weight.

    The path may be that of a layer's slice, or of a tree that repeats the parameters', as an
    optimizer's moments do.
    """
    known = _by_end(table())
    return next((known[end] for n in (2, 1) if (end := tuple(path[-n:])) in known), None)


@functools.lru_cache(maxsize=8)
def _by_end(rows: tuple[Weight, ...]) -> dict[tuple[str, ...], Weight]:
    """Rows by module and name, and by name alone where that says which."""
    found: dict[tuple[str, ...], Weight] = {}
    originals = [row for row in rows if not row.copy]
    for row in originals:
        found.setdefault((*row.module, row.name)[-2:], row)
        if len({(other.shape, other.cut) for other in originals if other.name == row.name}) == 1:
            found.setdefault((row.name,), row)
    return found


def sizes(config: ModelConfig) -> dict[str, int]:
    """The letters of `Weight.shape`: those of dsv3_jax, and sums of them."""
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "2D": 2 * config.hidden_size,
        "N": config.num_attention_heads,
        "HR": nope + rope,
        "HU": nope + value,
        "U": value,
        "Q": config.q_lora_rank or 0,
        "C": config.kv_lora_rank,
        "CR": config.kv_lora_rank + rope,
        "I": config.intermediate_size,  # of a dense layer
        "E": config.n_routed_experts,
        "F": config.moe_intermediate_size,
        "SF": config.n_shared_experts * config.moe_intermediate_size,
    }


_sizes = functools.lru_cache(maxsize=64)(sizes)


def _size(letter: str, config: ModelConfig) -> int:
    return int(letter) if letter.isdigit() else _sizes(config)[letter]
