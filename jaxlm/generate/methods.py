"""Published ways to guess, by name."""

from collections.abc import Sequence
from dataclasses import replace

from jaxlm.generate.draft import DraftConfig
from jaxlm.generate.draft_sources import Databases
from jaxlm.generate.speculative import Guessing

# Settings of the papers where they have one; widths are empty: every step verifies all guesses.
METHODS: dict[str, Guessing | None] = {
    "none": None,
    # Saxena 2023: the prompt or text behind the latest three tokens, ten tokens on
    "pld": Guessing(draft=DraftConfig(order=("prompt",), num_candidates=1, depth=10, num_nodes=10, max_ngram=3)),
    # Fu et al. 2024, arXiv:2402.02057: window 7, level 5, guess set 7
    "lookahead": Guessing(draft=DraftConfig(order=("pool",), num_candidates=7, depth=4, num_nodes=28), window=7),
    # He et al. 2024, arXiv:2311.08252: suffixes of 16 to 2 tokens, ten tokens on, a tree of 64 nodes
    "rest": Guessing(draft=DraftConfig(order=("corpus",), num_candidates=16, depth=10, num_nodes=64,
                                       suffix_lengths=tuple(range(16, 1, -1)))),
    # Luo et al. 2024, arXiv:2408.08696: a tree of 80 nodes over the last seen successors
    "recycling": Guessing(draft=DraftConfig(order=("recycling",), num_candidates=64, depth=6, num_nodes=80)),
    # Cho et al. 2025, arXiv:2502.05609: seven continuations of four tokens, without and with the window
    "hierarchy": Guessing(draft=DraftConfig(order=("context", "model", "corpus"))),
    "hierarchy_window": Guessing(draft=DraftConfig(order=("pool", "context", "model", "corpus")), window=7),
}


def adapted(guessing: Guessing, widths: Sequence[int], costs: Sequence[float]) -> Guessing:
    """The method with the width of every step chosen by what it costs on a device (`costs.step_costs`).

    Widths beyond the nodes of the method are left out, and no step verifies more than the widest one given. A Lookahead
    window has a fixed step and stays as it is.
    """
    if guessing.window or guessing.model is not None:
        return guessing
    chosen = [(width, cost) for width, cost in zip(widths, costs, strict=True) if width <= guessing.draft.num_nodes]
    return replace(guessing, widths=tuple(width for width, _ in chosen), costs=tuple(cost for _, cost in chosen))


def missing_database(guessing: Guessing, databases: Databases) -> str | None:
    """The name of a database that the method reads and that is not there."""
    return next((name for name in ("model", "corpus")
                 if name in guessing.draft.order and getattr(databases, name) is None), None)
