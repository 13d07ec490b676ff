"""LoRA against peft on transformers' model: logits, gradients, and an adapter that peft loads."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Config, LoraConfig, ScheduleConfig, TrainConfig
from dsv3_jax.interop.checkpoint import from_variables
from dsv3_jax.interop.exporting import export_hf
from dsv3_jax.interop.load import load_hf
from dsv3_jax.interop.name_map import places
from dsv3_jax.interop.peft_adapter import export_adapter, peft_form
from dsv3_jax.model.adapters import init_adapters, merged, with_adapters
from dsv3_jax.model.transformer import forward
from dsv3_jax.training.loss import training_loss
from tests.fixtures.interop.tiny import TINY, hf_tensors, write_hf

MODEL = dataclasses.replace(TINY, num_nextn_predict_layers=0)
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def random_adapters(lora, rng):
    shapes = jax.eval_shape(lambda key: init_adapters(key, MODEL, lora), jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.05, s.dtype), shapes)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("hf") / "m", MODEL, hf_tensors(MODEL, "f32"))


def transformers_model(hf):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def peft_model(hf, folder, **options):
    peft = pytest.importorskip("peft", reason="needs the oracle extra: peft is not installed")
    return peft.PeftModel.from_pretrained(transformers_model(hf), folder, **options)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "targets",
    [
        FEED_FORWARD,
        ("mlp/experts/down_proj", "mlp/down_proj", "o_proj"),
        ("mlp/experts/gate_up_proj", "shared_experts/gate_up_proj"),
    ],
    ids=str,
)
def test_peft_answers_with_our_feed_forwards(hf, tmp_path, targets):
    """Dense, shared and routed, whose adapters of a layer are peft's of one parameter."""
    torch = pytest.importorskip("torch")
    lora = LoraConfig(rank=3, alpha=9.0, targets=targets)
    rng = np.random.default_rng(0)
    adapters = random_adapters(lora, rng)
    rows = rng.integers(2, MODEL.vocab_size, (2, 17)).astype(np.int32)
    _, variables = load_hf(hf, dtype="f32")
    params = with_adapters(variables["params"], adapters, lora)
    logits = jax.jit(lambda v: forward(v, rows, MODEL).logits)
    ours, plain = logits({**variables, "params": params}), logits(variables)
    folder = export_adapter(adapters, MODEL, lora, str(hf), tmp_path / "adapter")
    with torch.no_grad():
        theirs = peft_model(hf, folder)(torch.tensor(rows.astype(np.int64))).logits.numpy()
    apart, moved = np.abs(ours - theirs).max(), np.abs(ours - plain).max()
    print(f"logits {apart:.2e} apart; the adapter moves them by {moved:.2f}")
    assert apart < 3e-4 and moved > 0.03

    merged_weights = {**variables, "params": merged(params, MODEL)}
    export_hf(from_variables(merged_weights, MODEL), tmp_path / "merged", "f32")
    with torch.no_grad():
        whole = transformers_model(tmp_path / "merged")
        theirs = whole(torch.tensor(rows.astype(np.int64))).logits.numpy()
    apart = np.abs(ours - theirs).max()
    print(f"merged: logits {apart:.2e} apart")
    assert apart < 3e-4


@pytest.mark.oracle
def test_peft_loads_our_adapter_and_has_our_gradients(hf, tmp_path):
    torch = pytest.importorskip("torch")
    lora = LoraConfig(rank=4, alpha=8.0, targets=ATTENTION)
    _, variables = load_hf(hf, dtype="f32")
    rng = np.random.default_rng(0)
    adapters = random_adapters(lora, rng)
    rows = rng.integers(2, MODEL.vocab_size, (2, 18)).astype(np.int32)
    config = Config(
        model=MODEL,
        train=TrainConfig(seq_len=17),
        schedule=ScheduleConfig(balance_loss_weight=0.0),
    )

    def held(adapters):
        params = with_adapters(variables["params"], adapters, lora)
        return {**variables, "params": params}

    @jax.jit
    def gradient(adapters):
        def loss(adapters):
            return training_loss(held(adapters), rows, jnp.float32(0.0), config)[0]

        return jax.value_and_grad(loss)(adapters)

    logits = jax.jit(lambda a: forward(held(a), rows[:, :-1], MODEL).logits)(adapters)
    loss, grads = gradient(adapters)

    folder = export_adapter(adapters, MODEL, lora, str(hf), tmp_path / "adapter")
    model = peft_model(hf, folder, is_trainable=True)
    ids = torch.tensor(rows.astype(np.int64))
    theirs = model(ids[:, :-1]).logits
    apart = float(np.abs(np.asarray(logits) - theirs.detach().numpy()).max())
    plain = np.asarray(jax.jit(lambda v: forward(v, rows[:, :-1], MODEL).logits)(variables))
    print(f"logits {apart:.2e} apart; the adapter moves them by {np.abs(plain - logits).max():.2f}")
    assert apart < 3e-4 and np.abs(plain - logits).max() > 0.1

    wanted = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), ids[:, 1:].flatten())
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    ours = peft_form(grads, MODEL).tensors
    found = {
        name.replace(".default.", "."): p.grad.numpy()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert found.keys() == ours.keys() and len(ours) == 30
    worst = max(
        float(np.abs(ours[n] - g).max() / np.sqrt(np.mean(np.square(g)))) for n, g in found.items()
    )
    print(f"worst gradient {worst:.2e} of {len(ours)}")
    assert worst < 1e-4
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    assert len(places(MODEL)) > len(ours)
