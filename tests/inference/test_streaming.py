"""Text as it comes: stop strings over several tokens, held back and never shown."""

import itertools

import pytest

from dsv3_jax.config import UserError
from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.inference.conversation import Conversation
from dsv3_jax.inference.requests import Token
from dsv3_jax.inference.streaming import TextStream, listener_of

BYTES = load_tokenizer("byte")


def shown(text: str, **options) -> tuple[str, bool]:
    """What a stream shows of a text that comes byte by byte, and whether it stopped by itself."""
    stream = TextStream(BYTES, **options)
    out = "".join(stream.push(int(i)) for i in BYTES.encode(text))
    stopped = stream.stopped
    return out + stream.flush(), stopped


@pytest.mark.parametrize("stops", [["ab"], ["aab", "b"], ["ba", "aa"], ["bbbb", "abab"], []])
def test_the_text_ends_before_the_first_stop_string(stops):
    for letters in itertools.product("ab", repeat=6):
        text = "".join(letters)
        found = [text.find(stop) for stop in stops if stop in text]
        # That which is complete first; of two that are, the one that begins first.
        ends = {text.find(s) + len(s) for s in stops if s in text}
        first = min(ends) if ends else None
        begins = [text.find(s) for s in stops if s in text and text.find(s) + len(s) == first]
        assert shown(text, stops=stops) == (text[: min(begins)] if found else text, bool(found))


def test_nothing_of_a_stop_string_is_shown_and_all_else_at_once():
    stream = TextStream(BYTES, stops=["END"])
    parts = [stream.push(int(i)) for i in BYTES.encode("xENéEND y")]
    assert parts == ["x", "", "", "", "ENé", "", "", "", "", ""] and stream.stopped


def test_characters_come_whole_and_a_broken_one_at_the_end():
    stream = TextStream(BYTES, ends=[BYTES.eos_token_id])
    ids = BYTES.encode("né").tolist()
    assert [stream.push(i) for i in ids[:-1]] == ["n", ""]
    assert stream.push(BYTES.eos_token_id) == "\N{REPLACEMENT CHARACTER}" and stream.stopped


def test_a_listener_ends_its_request_at_a_stop_string():
    heard = []
    listen = listener_of(TextStream(BYTES, stops=["st"]), heard.append)
    tokens = [Token(int(i), 0.0) for i in BYTES.encode("a stop")]
    assert not listen(tokens[:3]) and listen(tokens[3:])
    assert heard == ["a "]


def test_a_conversation_keeps_its_turns_and_takes_a_question_back():
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}",
        {},
    )
    talk = Conversation(template, BYTES, system="be brief")
    assert BYTES.decode(talk.ask("hi")) == "s:be brief;u:hi;a:"
    talk.answer("ho")
    assert BYTES.decode(talk.ask("again")) == "s:be brief;u:hi;a:ho;u:again;a:"
    talk.answer(None)
    assert [m["content"] for m in talk.messages] == ["be brief", "hi", "ho"]


def test_a_template_that_fails_leaves_the_conversation_as_it_was():
    failing = ChatTemplate("{{ raise_exception('no system messages') }}", {})
    talk = Conversation(failing, BYTES)
    with pytest.raises(UserError, match="no system messages"):
        talk.ask("hi")
    assert talk.messages == []
