"""A conversation with a model: its messages as a prompt, and the answers as further messages."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from dsv3_jax.config import UserError
from dsv3_jax.data.chat import ChatTemplate, Message
from dsv3_jax.data.tokens import Tokenizer
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Request, seed_of
from dsv3_jax.inference.streaming import TextStream, listener_of


def chat_prompt(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer
) -> tuple[int, ...]:
    """The ids of a conversation and of what opens the assistant's next turn.

    UserError for a message that spells a special token: it would end its turn, or begin another's;
    raises as `ChatTemplate.render`.
    """
    for number, message in enumerate(messages, start=1):
        if spelt := tokenizer.spells_special(message["content"]):
            raise UserError(f"message {number} spells the special token {spelt!r}")
    text = template.render(messages, add_generation_prompt=True)
    ids, _ = tokenizer.encode_with_special(text)
    if not len(ids):
        raise UserError("the chat template writes nothing for this conversation")
    return tuple(ids.tolist())


class Conversation:
    """Messages in turn, the user's and the assistant's."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, system: str | None = None):
        self._template, self._tokenizer = template, tokenizer
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def ask(self, text: str) -> tuple[int, ...]:
        """The prompt for an answer to this; as `chat_prompt` raises, and then nothing was asked."""
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = chat_prompt(asked, self._template, self._tokenizer)
        self.messages = asked
        return prompt

    def answer(self, text: str | None) -> None:
        """What the assistant said; None takes the question back."""
        if text is None:
            self.messages.pop()
        else:
            self.messages.append({"role": "assistant", "content": text})


def talk(
    engine: Engine,
    conversation: Conversation,
    tokenizer: Tokenizer,
    request: Request,
    stops: Sequence[str] = (),
    read: Callable[[str], str] | None = None,
) -> None:
    """An interactive conversation, until the input ends: every answer is shown as it comes.

    `request` says how to answer; its prompt is not read. What cannot be asked (a conversation
    longer than the cache, a template that fails) is said, and the conversation goes on without it.
    """
    turn, read = 0, read or input
    while True:
        try:
            text = read("> ")
        except EOFError:
            print()
            return
        if not text.strip():
            continue
        try:
            prompt = conversation.ask(text)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        stream = TextStream(tokenizer, request.ends(engine.config), stops)
        said: list[str] = []

        def show(piece: str, said: list[str] = said) -> None:
            said.append(piece)
            print(piece, end="", flush=True)

        asked = replace(
            request,
            prompt=prompt,
            seed=seed_of(request.seed, turn),
            listener=listener_of(stream, show),
        )
        try:
            completion = engine.submit(asked)
        except UserError as error:
            conversation.answer(None)
            print(f"error: {error}", file=sys.stderr)
            continue
        try:
            while not completion.done:
                engine.step()
        except KeyboardInterrupt:  # ends the answer, not the conversation
            engine.cancel(completion)
            while engine.busy:
                engine.step()
        show(stream.flush())
        print()
        conversation.answer("".join(said))
        turn += 1
