"""For the site: examples (>>> lines) of docstrings in fences; Markdown would quote them."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\n).+)*", re.MULTILINE)


def fenced(text: str) -> str:
    """The text with every example, up to the next empty line, between fences.

    >>> print(fenced("Adds.\\n\\n>>> 1 + 1\\n2").count("```"))
    2
    """
    return EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", text)


class FenceExamples(griffe.Extension):
    """Applied by griffe to each object that has a docstring (mkdocs.yml)."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
