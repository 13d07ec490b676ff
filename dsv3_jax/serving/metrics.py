"""What Prometheus scrapes: the engine's counts, in its text format."""

from collections import Counter
from collections.abc import Mapping

from dsv3_jax.serving.worker import Worker


class Metrics:
    """The numbers of a worker's engine, and how many requests were refused."""

    def __init__(self, worker: Worker):
        self._worker, self._refused = worker, Counter[int]()

    def refused(self, status: int) -> None:
        """Counts an answer that is an error."""
        self._refused[status] += 1

    def text(self) -> str:
        """All metrics, in the exposition format 0.0.4."""
        engine = self._worker.engine
        counts, lines = engine.statistics, []

        def add(name: str, kind: str, about: str, values: Mapping[str, float] | float) -> None:
            lines.append(f"# HELP dsv3_{name} {about}")
            lines.append(f"# TYPE dsv3_{name} {kind}")
            if not isinstance(values, Mapping):
                values = {"": values}
            lines.extend(f"dsv3_{name}{label} {value:g}" for label, value in values.items())

        free = sum(pool.free_pages for pool in engine.pools)
        pages = sum(pool.pages for pool in engine.pools)
        add("requests_running", "gauge", "Sequences that hold a slot.", engine.running)
        add("requests_waiting", "gauge", "Requests in the queue.", engine.waiting)
        finished = {f'{{reason="{name}"}}': n for name, n in dict(counts.requests).items()}
        add("requests_finished_total", "counter", "Requests that ended.", finished)
        refused = {f'{{status="{status}"}}': n for status, n in sorted(self._refused.items())}
        add("requests_refused_total", "counter", "Requests answered with an error.", refused)
        add("prompt_tokens_total", "counter", "Of prompts, computed.", counts.prompt_tokens)
        add(
            "cached_tokens_total",
            "counter",
            "Of prompts, found cached.",
            counts.cached_tokens,
        )
        add("new_tokens_total", "counter", "Tokens written.", counts.new_tokens)
        add("steps_total", "counter", "Decoding steps.", counts.steps)
        add(
            "preemptions_total",
            "counter",
            "Sequences that gave pages back.",
            counts.preemptions,
        )
        add("pages", "gauge", "Pages of the cache.", pages)
        add("pages_free", "gauge", "Pages that no sequence holds.", free)
        for name, numbers in (("drafted", counts.drafted), ("accepted", counts.accepted)):
            by_place = {f'{{position="{i + 1}"}}': n for i, n in enumerate(numbers)}
            add(f"drafts_{name}_total", "counter", f"Drafts {name}, by position.", by_place)
        return "\n".join(lines) + "\n"
