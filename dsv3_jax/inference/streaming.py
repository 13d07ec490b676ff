"""Text as tokens come in: whole characters, and nothing of a string that ends it."""

from collections.abc import Callable, Container, Sequence

from dsv3_jax.data.tokens import StreamDecoder, Tokenizer
from dsv3_jax.inference.requests import Listener, Token


class TextStream:
    """The text of a continuation, up to the first of some stop strings or ids.

    What `push` returns is certain: the beginning of a stop string is held back until it is known
    not to be one. All pushes and the flush, joined, are the whole text.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Container[int] = (), stops: Sequence[str] = ()):
        self._decoder = StreamDecoder(tokenizer, continues=True)
        self._ends, self._stops = ends, tuple(stops)
        self._held = ""
        self.stopped = False  # a stop string or id has come

    def push(self, token_id: int) -> str:
        """The characters that are certain with this id."""
        if self.stopped:
            return ""
        if token_id in self._ends:
            return self.flush()
        return self._certain(self._decoder.push(token_id))

    def flush(self) -> str:
        """What is left at the end."""
        if self.stopped:
            return ""
        certain = self._certain(self._decoder.flush())
        rest, self._held = self._held, ""
        self.stopped = True
        return certain + rest

    def _certain(self, new: str) -> str:
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        # The longest end of the text that some stop string begins with.
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                self._held = text[-length:]
                return text[:-length]
        self._held = ""
        return text


class IdStream:
    """`TextStream` for ids: they are shown with commas between, the one that ends the text too."""

    def __init__(self, ends: Container[int] = ()):
        self._ends, self._separator, self.stopped = ends, "", False

    def push(self, token_id: int) -> str:
        """The id, after a comma if it is not the first."""
        if self.stopped:
            return ""
        shown, self._separator = f"{self._separator}{token_id}", ","
        self.stopped = token_id in self._ends
        return shown

    def flush(self) -> str:
        """Nothing: no id is ever held back."""
        return ""


def listener_of(stream: TextStream | IdStream, show: Callable[[str], None]) -> Listener:
    """A request's listener that shows the text as it comes, and ends it at a stop string."""

    def listen(tokens: list[Token]) -> bool:
        text = "".join(stream.push(token.id) for token in tokens)
        if text:
            show(text)
        return stream.stopped

    return listen
