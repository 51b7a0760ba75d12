"""A claim that grows with the arrival bounds by itself how many later ones can be lower: no clock, no counter."""

from minivllm.scheduler.policy import FirstComeFirstServed
from minivllm.scheduler.request import RequestView

MOST_OVERTAKEN = 40


class ShortestFirst(FirstComeFirstServed):
    """Few tokens first; an arrival counts as much as ``MOST_OVERTAKEN`` later ones allow."""

    def claim(self, request: RequestView) -> tuple[float, ...]:
        """The arrival, and at most ``MOST_OVERTAKEN`` places more for whoever wants many tokens."""
        wanted = request.spec.sampling.max_tokens or 0
        return (request.uid + min(wanted, MOST_OVERTAKEN), wanted, request.uid)
