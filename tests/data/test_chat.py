"""Chat templates: what transformers renders, targets told exactly, and hostile ones stopped."""

import time

import pytest

from dsv3_jax.data import chat
from dsv3_jax.data.chat import (
    DEFAULT_TEMPLATE,
    ChatTemplate,
    TemplateFailed,
    check_messages,
    load_chat_template,
)

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "4 "},
]
CHATML = """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}
{% endfor %}
{% if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""
# Keeps the reasoning of the last turn only, as R1's does.
FORGETFUL = """\
{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and not loop.last %}
{{- m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""


def targets(template: str, messages=TALK) -> list[str]:
    rendered = ChatTemplate(template, SPECIAL).render_targets(messages)
    return [rendered.text[start:stop] for start, stop in rendered.targets]


def test_the_default_template_is_v3s_form():
    template = ChatTemplate(DEFAULT_TEMPLATE, SPECIAL)
    assert template.render(TALK[:2], add_generation_prompt=True) == (
        "<s>Be brief.<｜User｜>1 + 1?<｜Assistant｜>"
    )
    assert template.render(TALK[1:3]) == "<s><｜User｜>1 + 1?<｜Assistant｜>2</s>"


@pytest.mark.parametrize(
    "template, expected",
    [
        (DEFAULT_TEMPLATE, ["2</s>", "4 </s>"]),
        (CHATML, ["2<|im_end|>\n", "4 <|im_end|>\n"]),
        (DEFAULT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""), None),
    ],
    ids=["marked", "chatml", "unmarked"],
)
def test_targets_are_the_assistants_turns_with_their_end(template, expected):
    assert targets(template) == (expected or targets(DEFAULT_TEMPLATE))


def test_targets_that_cannot_be_told_are_refused():
    reasoned = [*TALK[1:2], {"role": "assistant", "content": "<think>hm</think>2"}, *TALK[3:]]
    with pytest.raises(TemplateFailed, match=r"up to message 2 in another way.*generation"):
        targets(FORGETFUL, reasoned)
    assert targets(FORGETFUL, reasoned[:2]) == ["<think>hm</think>2"]


@pytest.mark.oracle
@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, CHATML, FORGETFUL])
@pytest.mark.parametrize("prompt", [False, True])
def test_transformers_renders_the_same(template, prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        [TALK], chat_template=template, add_generation_prompt=prompt, **SPECIAL
    )
    ours = ChatTemplate(template, SPECIAL).render(TALK, add_generation_prompt=prompt)
    assert ours == expected[0]


@pytest.mark.oracle
def test_transformers_marks_the_same_targets():
    from transformers.utils.chat_template_utils import render_jinja_template

    _, spans = render_jinja_template(
        [TALK], chat_template=DEFAULT_TEMPLATE, return_assistant_tokens_mask=True, **SPECIAL
    )
    rendered = ChatTemplate(DEFAULT_TEMPLATE, SPECIAL).render_targets(TALK)
    assert [tuple(span) for span in spans[0]] == list(rendered.targets)


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe|not safe"),
        ("{% set _ = messages.append(1) %}", "unsafe|not safely|not safe"),
        ("{{ 'a' * 10 ** 9 }}", "too often"),
        ("{{ 10 ** 10 ** 10 }}", "too large"),
        ("{{ '%1000000000d' % 1 }}", "too wide"),
        ("{{ 'a' | center(1000000000) }}", "too large"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange too big"),
        ("{{ messages[7].content }}", "no element 7|undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion|Recursion"),
        ("{% for m in messages %}", "does not compile"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_hostile_template_fails_in_one_line(template, words):
    with pytest.raises(TemplateFailed, match=words) as failed:
        ChatTemplate(template, SPECIAL).render(TALK)
    assert "\n" not in str(failed.value)


def test_what_is_python_stays_out_of_reach():
    for expression in ("''.join.__globals__", "lipsum"):
        assert ChatTemplate("{{ " + expression + " }}", SPECIAL).render(TALK) == ""
    with pytest.raises(TemplateFailed, match="unsafe"):
        ChatTemplate("{{ cycler.__init__.__globals__ }}", SPECIAL).render(TALK)


def test_a_template_cannot_run_or_write_without_end(monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.2)
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    started = time.perf_counter()
    with pytest.raises(TemplateFailed, match=r"longer than 0\.2 s"):
        ChatTemplate(loop, SPECIAL).render(TALK)
    assert time.perf_counter() - started < 5
    monkeypatch.setattr(chat, "MAX_RENDERED_CHARACTERS", 1000)
    with pytest.raises(TemplateFailed, match="more than 1,000 characters"):
        ChatTemplate("{% for i in range(9999) %}ab{% endfor %}", SPECIAL).render(TALK)


@pytest.mark.parametrize(
    "messages, words",
    [
        ([], "at least one"),
        ("hello", "not a list"),
        (["hello"], "message 1 is a str"),
        ([{"role": "tool", "content": "x"}], "message 1 has role 'tool'"),
        ([TALK[1], {"role": "assistant", "content": None}], "message 2 .assistant.: content is No"),
    ],
)
def test_what_is_no_conversation_is_named(messages, words):
    with pytest.raises(ValueError, match=words):
        check_messages(messages)


def test_a_folders_template_is_found(tmp_path):
    assert load_chat_template(tmp_path, SPECIAL) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": "of the config"}')
    found = load_chat_template(tmp_path, SPECIAL)
    assert found is not None and found.source == "of the config"
    config.write_text('{"chat_template": [{"name": "default", "template": "one of several"}]}')
    found = load_chat_template(tmp_path, SPECIAL)
    assert found is not None and found.source == "one of several"
    (tmp_path / "chat_template.jinja").write_text("a file of its own")
    found = load_chat_template(tmp_path, SPECIAL)
    assert found is not None and found.source == "a file of its own"
    (tmp_path / "chat_template.jinja").unlink()
    for wrong in ('{"chat_template": 3}', '{"chat_template": [{"name": "rag"}]}', "[]", "{"):
        config.write_text(wrong)
        with pytest.raises(TemplateFailed, match="template"):
            load_chat_template(tmp_path, SPECIAL)
