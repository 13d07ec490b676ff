"""Ten usual things of a researcher, with the public surface alone, in under 60 lines."""

import ast
from pathlib import Path

import jax
import pytest

SCRIPT = """
import dataclasses, sys
from functools import partial
import jax, jax.numpy as jnp, numpy as np
import dsv3_jax as ds

# 1. Build: a config that ships, made smaller.
tiny = ds.load_config("tiny")
model = dataclasses.replace(tiny.model, hidden_size=32, num_hidden_layers=2, vocab_size=64)
config = dataclasses.replace(tiny, model=model)
variables = jax.jit(partial(ds.init, config=model))(jax.random.key(0))
rows = np.random.default_rng(0).integers(2, 64, (8, 17))

# 2. Forward: logits, and those of MTP.
out = jax.jit(ds.forward, static_argnames="config")(variables, rows[:, :-1], model)
assert out.logits.shape == out.mtp_logits[0].shape == (8, 16, 64)

# 3. Gradients of the training loss.
def loss_of(params, extensions=ds.Extensions(), layout=ds.ONE_DEVICE):
    trees = {"params": params, "router": variables["router"]}
    return ds.training_loss(trees, rows, jnp.float32(0.3), config, layout, extensions)

gradient = partial(jax.value_and_grad, has_aux=True)
(loss, terms), grads = jax.jit(gradient(loss_of))(variables["params"])

# 4. Loads of the experts: every token went to K of them.
assert (terms.load["moe_layers"].sum(-1) == rows[:, :-1].size * model.num_experts_per_tok).all()

# 5. A router of one's own, 6. an attention mask, 7. a loss.
def softplus(logits):
    return jax.nn.softplus(logits)

def window(query, key):
    return query - key < 4

def accuracy_weighted(outputs, rows):
    right = jax.nn.log_softmax(outputs.logits)
    nats = -jnp.take_along_axis(right, rows[:, 1:, None], -1)
    return (nats * jax.lax.stop_gradient(1 - jnp.exp(-nats))).mean()

own = ds.Extensions(score=softplus, attention_bias=window, loss=accuracy_weighted)
(own_loss, _), _ = jax.jit(gradient(partial(loss_of, extensions=own)))(variables["params"])
assert own_loss != loss

# 8. Eight devices: experts over four, the batch over all; the same loss.
mesh = ds.make_mesh(ds.ParallelConfig(data=2, node=2, local=2))
layout = ds.make_layout(mesh, ds.ShardingConfig(), ds.ExpertParallelConfig())
spread = jax.device_put(variables, ds.shardings(variables, layout))
sharded, _ = jax.jit(partial(loss_of, layout=layout))(spread["params"])
assert abs(sharded - loss) < 1e-5

# 9. Save a run, load it, write with it.
loaded = ds.load(ds.save(ds.Model(config, ds.ONE_DEVICE, variables), sys.argv[1]))
text = [int(ids[0]) for ids in ds.generate(loaded.variables, [[5, 6]], model, max_new_tokens=3)]

# 10. Quantise a weight, and see the error.
weight = variables["params"]["lm_head"]
error = jnp.abs(ds.dequantize(ds.quantize(weight, ds.PER_BLOCK), jnp.float32) - weight)
print(text, float(error.max() / jnp.abs(weight).max()))
"""


def test_ten_usual_things_take_under_sixty_lines():
    lines = [line for line in SCRIPT.splitlines() if line.strip()]
    assert len(lines) < 60
    imported = {
        name.partition(".")[0] + ("!" if "dsv3_jax." in name else "")
        for node in ast.walk(ast.parse(SCRIPT))
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported == {"dataclasses", "sys", "functools", "jax", "numpy", "dsv3_jax"}


@pytest.mark.slow
def test_the_ten_things_do_what_they_say(tmp_path, monkeypatch, capsys):
    assert len(jax.devices()) == 8
    monkeypatch.setattr("sys.argv", ["script", str(tmp_path / "run")])
    exec(compile(SCRIPT, "script", "exec"), {"__name__": "script"})
    text, error = capsys.readouterr().out.rsplit(" ", 1)
    assert len(ast.literal_eval(text)) == 3
    assert 0 < float(error) < 2**-4  # E4M3 has three bits behind its first
    assert Path(tmp_path, "run", "checkpoints", "0", "MANIFEST.json").exists()
