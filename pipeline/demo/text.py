"""The text encoder's own task, before it is frozen: to answer what a caption says about each colour and place.

    caption -> token states -> one attention layer with a query for each colour and place -> the facts of that thing

Stable Diffusion starts from CLIP's text encoder, which was trained with images and already relates words to each
other. A text encoder trained only by the U-Net's loss learned colours but few relations, because a relation hardly
changes the predicted noise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.demo.scenes import COLOURS, COUNT_WORDS, SHAPES, SIZES, SceneFacts

ANYWHERE, BACKGROUND = "anywhere", "background"
# Relation -> the places of the first and the second object.
PLACES = {
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
    "left of": ("left", "right"),
    "right of": ("right", "left"),
}
# Kind of fact -> its possible values. A "thing" is one object noun of a caption or the background.
VALUES: dict[str, tuple[str | int, ...]] = {
    "colour": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "count": (1, *COUNT_WORDS),
    "size": tuple(filter(None, SIZES)),
    "place": (*PLACES["above"], *PLACES["left of"], ANYWHERE, BACKGROUND),
}
# A caption has at most one thing of each colour and at most one thing in each place.
QUERIES = tuple((kind, value) for kind in ("colour", "place") for value in VALUES[kind])


def things_of(facts: SceneFacts) -> list[dict[str, str | int | None]]:
    """The things that a caption names, as kind of fact -> value, or None for a fact that the caption leaves open."""
    places = PLACES[facts.relation] if facts.relation else (ANYWHERE,)
    objects: list[dict[str, str | int | None]] = [
        {"colour": item.colour, "shape": item.shape, "count": item.count, "size": item.size, "place": place}
        for item, place in zip(facts.objects, places, strict=True)
    ]
    return [*objects, {"colour": facts.background, "place": BACKGROUND}]


def answers_of(facts: SceneFacts) -> torch.Tensor:
    """For each query and kind of fact, the value's index counted from 1, or 0 for no answer. int64 (15, 5)."""
    things = {(kind, thing[kind]): thing for thing in things_of(facts) for kind in ("colour", "place")}
    return torch.tensor(
        [
            [
                values.index(value) + 1 if (value := things.get(query, {}).get(kind)) else 0
                for kind, values in VALUES.items()
            ]
            for query in QUERIES
        ]
    )


class Reader(nn.Module):
    """Token states (B, T, width) -> logits of each query's answers, by kind of fact: (B, 15, values + 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(QUERIES), width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.answers = nn.ModuleDict({kind: nn.Linear(width, len(values) + 1) for kind, values in VALUES.items()})

    def forward(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        queries = self.queries.expand(len(states), -1, -1)
        read = self.norm(queries + self.attention(queries, states, states, need_weights=False)[0])
        return {kind: answer(read) for kind, answer in self.answers.items()}


def reading_loss(logits: dict[str, torch.Tensor], answers: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the answers (B, 15, 5), averaged over queries and summed over kinds of fact."""
    losses = [
        F.cross_entropy(values.flatten(0, 1), answers[..., kind].flatten())
        for kind, values in enumerate(logits.values())
    ]
    return sum(losses, torch.zeros(()))
