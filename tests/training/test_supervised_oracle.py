"""A batch of conversations against transformers and torch: loss, gradients, an optimizer step."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Config, OptimizerConfig, ScheduleConfig, TrainConfig
from dsv3_jax.data.chat import DEFAULT_TEMPLATE, ChatTemplate
from dsv3_jax.data.packed_rows import PackedRows
from dsv3_jax.data.shards import TokenShards
from dsv3_jax.data.supervised import prepare_supervised
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.interop.load import load_hf
from dsv3_jax.interop.name_map import places
from dsv3_jax.training.loss import Supervised, training_loss
from dsv3_jax.training.optimizer import make_optimizer
from tests.fixtures.interop.tiny import TINY, hf_tensors, write_hf

MODEL = dataclasses.replace(TINY, vocab_size=320, num_nextn_predict_layers=0, bos_token_id=0)
LENGTH = 200


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """(folder of weights, packed rows of conversations, the documents one by one)."""
    folder = tmp_path_factory.mktemp("oracle")
    hf = write_hf(folder / "hf", MODEL, hf_tensors(MODEL, "f32"))
    text = ["question answer more words of a talk " * 20]
    tokenizer = train_tokenizer(text, 300, hf / "tokenizer.json")
    lines = [
        {
            "messages": [
                {"role": "system", "content": "words"},
                {"role": "user", "content": "question " * (1 + n % 3)},
                {"role": "assistant", "content": "answer " * (1 + n)},
                {"role": "user", "content": "more"},
                {"role": "assistant", "content": "of a talk"},
            ]
        }
        for n in range(5)
    ]
    path = folder / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    template = ChatTemplate(DEFAULT_TEMPLATE, tokenizer.special_spellings)
    prepare_supervised([path], folder / "data", tokenizer, template, val_fraction=0.01)
    shards = TokenShards(folder / "data" / "train")
    packed = PackedRows(shards, LENGTH + 1, 0, pad_id=1)
    rows = Supervised(*packed.windows(range(packed.num_windows)))
    starts = shards.document_starts
    bounds = list(zip(starts[:-1].tolist(), starts[1:].tolist()))
    return hf, rows, [(shards.slice(a, b), shards.targets(a, b)) for a, b in bounds]


def torch_gradients(hf, documents):
    """(model, loss) with its gradients: each document alone, the mean over all targets."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, attn_implementation="eager"
    )
    model.train()
    count = sum(int(targets[1:].sum()) for _, targets in documents)
    loss = torch.zeros(())
    for ids, targets in documents:
        ids = torch.tensor(ids[None].astype(np.int64))
        wanted = torch.where(torch.tensor(targets[1:]), ids[0, 1:], -100)
        logits = model(ids).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / count
    loss.backward()
    return model, float(loss)


def by_published_name(parameters):
    """Arrays by published names; transformers holds a layer's experts as one."""
    found = {}
    for name, array in parameters:
        if ".experts." not in name:
            found[name] = array
            continue
        layer, _, kind = name.rpartition(".")
        for expert, matrix in enumerate(array):
            if kind == "down_proj":
                found[f"{layer}.{expert}.down_proj.weight"] = matrix
            else:
                gate, up = np.split(matrix, 2)
                found[f"{layer}.{expert}.gate_proj.weight"] = gate
                found[f"{layer}.{expert}.up_proj.weight"] = up
    return found


@pytest.mark.oracle
def test_loss_gradients_and_a_step_are_those_of_torch(chat):
    hf, rows, documents = chat
    model, expected = torch_gradients(hf, documents)
    theirs = by_published_name([(n, p.grad.numpy()) for n, p in model.named_parameters()])
    _, variables = load_hf(hf, dtype="f32")
    assert (rows.segments.max(1) > 1).any(), "no row holds two documents"
    options = OptimizerConfig(learning_rate=1e-3, clip_norm=1e9)
    config = Config(
        model=MODEL,
        train=TrainConfig(seq_len=LENGTH),
        schedule=ScheduleConfig(balance_loss_weight=0.0),
        optimizer=options,
    )

    @jax.jit
    def gradient(params):
        def loss(params):
            held = {**variables, "params": params}
            return training_loss(held, rows, jnp.float32(0.0), config)[0]

        return jax.value_and_grad(loss)(params)

    loss, grads = gradient(variables["params"])
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    worst = 0.0
    compared = 0
    for name, place in places(MODEL).items():
        if place.path[0] != "params" or place.copy:
            continue
        leaf = grads
        for key in place.path[1:]:
            leaf = leaf[key]
        ours = np.asarray(leaf[place.index]).reshape(place.shape)
        scale = np.sqrt(np.mean(np.square(theirs[name])))
        if scale == 0:  # an expert that no token chose
            assert not ours.any(), name
            continue
        worst = max(worst, float(np.abs(ours - theirs[name]).max() / scale))
        compared += 1
    print(
        f"loss {float(loss):.6f} against {expected:.6f}; worst gradient {worst:.2e} of {compared}"
    )
    assert compared > 40 and worst < 1e-4

    # One AdamW step.
    import torch

    before = by_published_name(
        [(n, p.detach().numpy().copy()) for n, p in model.named_parameters()]
    )
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-3, betas=(options.b1, options.b2), eps=options.eps).step()
    after = by_published_name([(n, p.detach().numpy()) for n, p in model.named_parameters()])
    optimizer = make_optimizer(options)
    updates, _ = jax.jit(optimizer.update)(
        grads, optimizer.init(variables["params"]), variables["params"]
    )
    new = jax.tree.map(lambda p, u: p - 1e-3 * u, variables["params"], updates)
    apart = []
    for name, place in places(MODEL).items():
        if place.path[0] != "params" or place.copy:
            continue
        leaf = new
        for key in place.path[1:]:
            leaf = leaf[key]
        ours = np.asarray(leaf[place.index]).reshape(place.shape)
        # Adam's first step is the gradient's sign: where the gradient is rounding, it is not told.
        told = np.abs(theirs[name]) > 1e-5 * np.abs(theirs[name]).max(initial=0)
        apart.append(np.abs(ours - after[name])[told].max(initial=0))
        assert (np.abs(after[name] - before[name]) > 0).any() or not theirs[name].any(), name
    print(f"worst parameter after a step: {max(apart):.2e}")
    assert max(apart) < 1e-6
