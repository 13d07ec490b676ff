"""The configs that ship, and what a config says about mistakes in it."""

import dataclasses
import json
from pathlib import Path

import pytest

from dsv3_jax import cli
from dsv3_jax.config import (
    Config,
    ExpertParallelConfig,
    ModelConfig,
    ParallelConfig,
    ShardingConfig,
    TrainConfig,
    UserError,
    config_from_dict,
    load_config,
    to_json,
)
from tests.helpers import tiny_config, tiny_model

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_fit_together(path):
    assert load_config(path).problems() == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_survive_json(path):
    config = load_config(path)
    assert config_from_dict(json.loads(to_json(config))) == config


@pytest.mark.parametrize(
    "option, said",
    [
        (["--seed", "4294967296"], "seed=4294967296 must lie in 0 to 4294967295"),
        (["--seed", "-1"], "seed=-1 must lie in"),
        (["--optimizer.learning-rate", "nan"], "learning_rate=nan must be a finite number"),
        (["--optimizer.clip-norm", "inf"], "clip_norm=inf must be a finite number"),
        (["--optimizer.weight-decay", "-0.1"], "weight_decay=-0.1 must not be negative"),
        (["--schedule.mtp-loss-weight", "-1"], "mtp_loss_weight=-1.0 must not be negative"),
        (["--schedule.final-ratio", "-1"], "final_ratio=-1.0 must not be negative"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(option, said):
    with pytest.raises(UserError, match=said):
        cli.parse_config(option, description="")


def test_a_choice_that_there_is_not_is_a_problem_also_outside_of_groups():
    said = Config(wandb="Online", train=TrainConfig(remat="some")).problems()  # type: ignore
    assert "wandb='Online' must be one of off, offline, online" in said
    assert any(problem.startswith("train.remat='some' must be one of") for problem in said)


def test_all_problems_are_reported_together_with_the_fix():
    config = dataclasses.replace(
        tiny_config(tiny_model(n_routed_experts=9, qk_rope_head_dim=3, eos_token_id=99)),
        train=TrainConfig(batch_size=10, micro_batch_size=4),
        mesh=ParallelConfig(data=-1),
        resume="maybe",
    )
    with pytest.raises(UserError) as error:
        config.validate()
    message = str(error.value)
    for problem in (
        "model.qk_rope_head_dim=3 must be even (RoPE rotates pairs): use 4",
        "model.n_routed_experts=9 must be a multiple of n_group=4: use n_routed_experts=12",
        "model.eos_token_id=99 is outside vocab_size=37",
        "train.batch_size=10 must be a multiple of micro_batch_size=4: use batch_size=12",
        "mesh.data=-1 must be positive, or 0 for all devices that are left",
        "resume='maybe' must be auto, never or a step number",
    ):
        assert problem in message
    assert message.count("\n  - ") == 6


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({"num_experts_per_tok": 9}, "exceeds n_routed_experts=8: use at most 8"),
        ({"topk_group": 5}, "topk_group=5 exceeds n_group=4: use at most 4"),
        (
            {"num_experts_per_tok": 5},
            "exceeds the 4 experts of topk_group=2 groups of 2: use topk_group=3 or more",
        ),
        ({"n_group": 8, "topk_group": 8}, "leaves 1 a group: use n_group=4 or fewer"),
        ({"q_lora_rank": 0}, "q_lora_rank=0 must be positive, or None"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1 must not be negative"),
        ({"first_k_dense_replace": 3}, "MTP modules are MoE blocks"),
        ({"hidden_size": 0}, "hidden_size=0 must be positive"),
    ],
)
def test_an_impossible_architecture_names_its_numbers(fields, problem):
    assert any(problem in found for found in tiny_model(**fields).problems())


@pytest.mark.parametrize(
    "config, problem",
    [
        (tiny_config(seq_len=65), "train.seq_len=65 exceeds model.max_position_embeddings=64"),
        (tiny_config(seq_len=1), "leaves nothing to predict at MTP depth 1"),
        (
            dataclasses.replace(tiny_config(), mesh=ParallelConfig(data=3)),
            "a micro-batch of 4 sequences must be a multiple of mesh.data x mesh.node x "
            "mesh.local = 3: use 6",
        ),
        (
            dataclasses.replace(tiny_config(), mesh=ParallelConfig(tensor=2)),
            "model.num_attention_heads=3 must be a multiple of mesh.tensor=2: use mesh.tensor=1 or",
        ),
        (
            dataclasses.replace(tiny_config(), mesh=ParallelConfig(tensor=2)),
            "model.vocab_size=37 must be a multiple of mesh.tensor=2: use mesh.tensor=1 or 38",
        ),
        (
            dataclasses.replace(
                tiny_config(),
                mesh=ParallelConfig(context=3),
                sharding=ShardingConfig(context="ring"),
            ),
            "train.seq_len=9 must be a multiple of 6, as mesh.context=3, mesh.tensor=1 and "
            "sharding.context=ring cut it into so many pieces: use 12",
        ),
        (
            dataclasses.replace(tiny_config(), mesh=ParallelConfig(node=3, local=2)),
            "model.n_routed_experts=8 must be a multiple of mesh.node x mesh.local = 6",
        ),
        (
            dataclasses.replace(
                tiny_config(),
                mesh=ParallelConfig(local=2),
                expert_parallel=ExpertParallelConfig(transport="local"),
            ),
            "expert_parallel.transport='local' moves nothing",
        ),
        (
            dataclasses.replace(
                tiny_config(),
                mesh=ParallelConfig(pipe=2, local=2),
                expert_parallel=ExpertParallelConfig(transport="pallas"),
            ),
            "ranks of mesh.pipe=2 reach at other times: use 'padded' or 'auto'",
        ),
        (
            dataclasses.replace(
                tiny_config(), expert_parallel=ExpertParallelConfig(capacity_factor=0)
            ),
            "expert_parallel.capacity_factor=0 must be positive",
        ),
        (
            dataclasses.replace(
                tiny_config(), expert_parallel=ExpertParallelConfig(combine_format="logfmt10")
            ),
            "model.hidden_size=24 must be a multiple of 16",
        ),
    ],
)
def test_groups_that_do_not_fit_each_other_are_named(config, problem):
    assert any(problem in found for found in config.problems())


def test_the_defaults_of_the_architecture_are_v3_s():
    """The released config.json; test_transformer.py counts its parameters."""
    config = ModelConfig()
    assert (config.num_moe_layers, config.num_dense_layers) == (58, 3)
    assert config.qk_head_dim == 192
    assert config.problems() == []


def test_unknown_fields_are_refused_by_name():
    with pytest.raises(UserError, match=r"the configuration: unknown field model\.n_experts"):
        config_from_dict({"model": {"n_experts": 4}})
    with pytest.raises(UserError, match="unknown field modle"):
        config_from_dict({"modle": {}})


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no such file"),
        ("x = 1", r"defines no get_config\(\)"),
        ("def get_config(): return 3", r"get_config\(\) returned int, not Config"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
    ],
)
def test_a_config_file_that_is_none_says_why(tmp_path, text, message):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path)


def test_a_config_is_hashable_and_frozen():
    """It is a static argument of compiled functions."""
    assert hash(tiny_config()) == hash(tiny_config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]
