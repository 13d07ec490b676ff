"""infer.py's doors beside plain prompts: speculation, stop strings, chat, and files of requests."""

import dataclasses
import json
import sys

import numpy as np
import pytest

import infer
from dsv3_jax import cli, loading
from dsv3_jax.config import Config
from dsv3_jax.parallel.sharding import ONE_DEVICE
from tests.helpers import random_variables, tiny_model

MODEL = tiny_model(num_hidden_layers=2, vocab_size=272, bos_token_id=256, eos_token_id=257)
MODEL = dataclasses.replace(MODEL, max_position_embeddings=128)
VARIABLES = random_variables(MODEL)
# Letters and blanks nearly always, so that stop strings of one letter come soon.
LOUD = np.where([chr(i) in "abcdefgh " for i in range(272)], 30.0, 0.0)[:, None]
VARIABLES["params"]["lm_head"] = VARIABLES["params"]["lm_head"] * LOUD.astype(np.float32)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs infer.py on a model with random weights; what it printed."""
    model = loading.Model(Config(model=MODEL), ONE_DEVICE, VARIABLES)
    monkeypatch.setattr(infer, "load", lambda *args, **how: model)

    def run(*options, code=0):
        argv = ["--checkpoint", str(tmp_path), "--tokenizer", "byte", "--max-new-tokens", "12"]
        monkeypatch.setattr(sys, "argv", ["infer.py", *argv, *map(str, options)])
        with pytest.raises(SystemExit) as stopped:
            cli.run_command(infer.main)
        shown = capsys.readouterr()
        assert stopped.value.code == code, shown.err
        return shown

    return run


def test_what_float32_is_rounded_to_is_told(run, monkeypatch):
    monkeypatch.setattr(infer, "rounding_line", lambda platform, dtype: f"of {dtype} on {platform}")
    assert "products of float32 on cpu\n" in run("--prompt", "a").err


@pytest.mark.slow
def test_speculation_says_the_same_and_reports_what_it_accepted(run):
    prompts = ["--prompt", "a bad", "--temperature", "0.7"]
    want = run(*prompts).out
    shown = run(*prompts, "--speculative", "2")
    assert shown.out == want and len(want) > 6
    assert "tokens a step; drafts accepted, by position: 0." in shown.err


def test_a_stop_string_ends_the_text_and_is_not_shown(run):
    whole = run("--prompt", "a bad", "--temperature", "0").out.removesuffix("\n")
    letters = whole.removeprefix("a bad")
    stop = letters[3:5]
    at = letters.index(stop)
    shown = run("--prompt", "a bad", "--temperature", "0", "--stop", "zz", "--stop", stop)
    assert shown.out == f"a bad{letters[:at]}\n"


def test_chat_prompts_go_through_the_template_and_answers_stand_alone(run, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    how = ["--temperature", "0", "--chat-template", template]
    shown = run("--chat", "--system", "be", "--prompt", "a bad", *how)
    # The template begins with no bos, so these are the ids of its text alone.
    ids = ",".join(str(b) for b in b"be|a bad|")
    want = run("--token-ids", ids, "--temperature", "0").out.strip().split(",")
    assert shown.out == bytes(int(i) for i in want).decode() + "\n"


@pytest.mark.slow
def test_without_a_prompt_chat_is_a_conversation_with_a_history(run, monkeypatch, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.content == 'x' %}{{ raise_exception('no x') }}{% endif %}"
        "{{ m.content }}|{% endfor %}"
    )
    lines = ["a bad", "", "x", "b" * 200, "cage"]

    def read(_):
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", read)
    shown = run("--chat", "--temperature", "0", "--chat-template", template, "--speculative", "1")
    first, second, _ = shown.out.split("\n", 2)
    assert "no x" in shown.err and "there is room for 128" in shown.err
    for text, answer in (("a bad|", first), (f"a bad|{first}|cage|", second)):
        ids = ",".join(str(b) for b in text.encode())
        want = run("--token-ids", ids, "--temperature", "0").out.strip().split(",")
        assert answer == bytes(int(i) for i in want).decode()


BATCH = [
    {"prompt": "a bad"},
    {"id": "talk", "messages": [{"role": "user", "content": "fed"}], "max_new_tokens": 3},
    {"token_ids": [256, 97], "temperature": 0.0, "seed": 4},
    {"prompt": "ab", "stop": ["a", "b", "c", "d", "e", "f", "g", "h", " "]},
]


@pytest.mark.slow
def test_a_file_of_requests_is_completed_and_goes_on_where_it_stopped(run, tmp_path):
    file, out = tmp_path / "requests.jsonl", tmp_path / "done.jsonl"
    file.write_text("\n".join(map(json.dumps, BATCH)))
    how = ["--batch", file, "--out", out, "--temperature", "0.7", "--slots", "2"]
    assert "4 of 4 requests were left" in run(*how).err
    lines = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert list(sorted(lines, key=str)) == [1, 3, 4, "talk"]
    assert lines["talk"]["completion_tokens"] == 3 and lines["talk"]["finish_reason"] == "length"
    assert len(lines[3]["token_ids"]) == 12 and "text" not in lines[3]
    assert (lines[4]["text"], lines[4]["finish_reason"]) == ("", "stop")
    assert lines[1]["prompt_tokens"] == 6
    assert all(0 <= x["seconds_to_first_token"] <= x["seconds"] for x in lines.values())
    # Two whole lines and a piece of the third were written when it was killed.
    whole = out.read_text()
    two = "".join(f"{line}\n" for line in whole.splitlines()[:2])
    out.write_text(two + whole.splitlines()[2][:20])
    assert "2 of 4 requests were left" in run(*how, "--speculative", "2").err
    again = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    what = ("text", "token_ids", "finish_reason", "completion_tokens")
    for key, line in lines.items():
        assert [again[key].get(name) for name in what] == [line.get(name) for name in what]
    assert "0 of 4 requests were left" in run(*how).err


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"prompt": "a"', "line 2: Expecting"),
        ('{"promt": "a"}', "line 2: unknown field 'promt'"),
        ('{"prompt": "a", "token_ids": [1]}', "has one of prompt, messages, token_ids; this has 2"),
        ('{"prompt": 3}', "line 2: prompt is a int, not text"),
        ('{"messages": [{"role": "dog", "content": "a"}]}', "message 1 has role 'dog'"),
        ('{"prompt": "a", "max_new_tokens": 1.5}', "max_new_tokens=1.5 is no whole number"),
        ('{"prompt": "a", "stop": [""]}', "stop="),
        ('{"prompt": "a", "id": "one"}', "id 'one' was there before"),
        ('{"prompt": "' + "a" * 200 + '"}', "line 2: the prompt has 201 tokens and 12 more"),
        ('{"token_ids": [1, 272]}', "line 2: the prompt has token ids from 1 to 272"),
        ('{"token_ids": []}', "line 2: the prompt is empty"),
        ('{"prompt": "a", "seed": -1}', "line 2: seed=-1"),
        ('{"prompt": "a", "temperature": -1}', "line 2: temperature=-1"),
        ('{"prompt": "a", "top_p": 1.5}', "line 2: top_p=1.5"),
        ('{"prompt": "a", "prompt": "b"}', "line 2: 'prompt' appears twice"),
        ("[" * 100000, "line 2:"),
    ],
)
def test_a_line_that_is_no_request_is_named_before_anything_is_written(line, said, run, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"id": "one", "prompt": "a"}\n' + line + "\n")
    shown = run("--batch", file, code=2)
    assert said in shown.err and "Traceback" not in shown.err
    assert not (tmp_path / "requests.completions.jsonl").exists()


def test_requests_longer_than_the_cache_are_named_too(run, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "abcdefghijk"}\n')
    shown = run("--batch", file, "--cache-length", "20", code=2)
    assert "line 2: the prompt has 12 tokens and 12 more are asked for" in shown.err
    assert not (tmp_path / "requests.completions.jsonl").exists()
    shown = run("--batch", file, "--out", tmp_path / "none" / "out.jsonl", code=2)
    assert f"out.jsonl: no folder {tmp_path / 'none'} to write it in" in shown.err


def test_a_line_of_the_file_ends_with_a_newline_alone(run, tmp_path):
    """JSON allows other ends of lines within a string as they are."""
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a\u2028b\x85c"}\n')
    assert "1 of 1 requests were left" in run("--batch", file).err
    (line,) = map(json.loads, (tmp_path / "requests.completions.jsonl").read_text().splitlines())
    assert line["prompt_tokens"] == 1 + len("a\u2028b\x85c".encode())


@pytest.mark.parametrize(
    "options, said",
    [
        ([], "--chat alone"),
        (["--prompt", "a", "--token-ids", "1"], "--chat alone"),
        (["--token-ids", "1", "--stop", "a"], "--chat and --stop are for text"),
        (["--prompt", "a", "--system", "be"], "--system is for a conversation: add --chat"),
        (["--prompt", "a", "--chat-template", "x"], "--chat-template is for conversations"),
        (["--batch", "x", "--chat"], "--chat is for --prompt"),
        (["--prompt", "a", "--out", "x"], "--out is for --batch"),
        (["--prompt", "a", "--slots", "3"], "--slots is for --batch"),
        (["--prompt", "a", "--expert-load", "prompts"], "--expert-load is for --redundant-experts"),
        (
            ["--chat", "--redundant-experts", "8", "--expert-load", "prompts"],
            "--expert-load prompts counts on --prompt",
        ),
        (["--prompt", "a", "--speculative", "-1"], "--speculative -1"),
        (["--prompt", "a", "--seed", "-1"], "seed=-1 must not be negative"),
        (["--prompt", "a", "--save-expert-load", "no/x"], "--save-expert-load no/x: no folder no"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options, said, run):
    assert said in run(*options, code=2).err


@pytest.mark.parametrize("more", [["--batch", "x"], ["--chat"]])
def test_several_processes_take_prompts_only(more, run, monkeypatch):
    monkeypatch.setattr(infer.jax, "process_count", lambda: 2)
    monkeypatch.setattr(infer.hosts, "check_agreement", lambda options: None)
    assert "are for one process" in run(*more, code=2).err
