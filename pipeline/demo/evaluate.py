"""How well a pipeline follows captions of scenes: it draws each, and the oracle counts the facts that hold.

captions -> pictures (DPM-Solver++, 25 steps) -> oracle -> share of facts that hold
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from diffusers import StableDiffusionPipeline
from PIL import Image

from pipeline.demo.oracle import Verdict, score
from pipeline.demo.scenes import SPLITS, caption_of, draw_facts, generator
from pipeline.sampling.generate import Sampler, generate

STEPS = 25
BATCH = 50
EVALUATION_SEED = 1_000_000
"""Far from the small seeds that training scenes are drawn from."""


@dataclass(frozen=True)
class Scores:
    """Over all captions: mean share of facts that hold, share of captions of which all do, and share by kind of fact.

    A caption's facts are few, so the mean over captions differs a little from the mean over facts.
    """

    captions: int
    score: float
    all_facts: float
    by_fact: dict[str, float]


def captions_of(split: str, count: int, seed: int = EVALUATION_SEED) -> list[str]:
    """Captions 0..count-1 of a split ("train" or "heldout"), without drawing their pictures."""
    return [caption_of(draw_facts(generator(seed, index, split), split)) for index in range(count)]


def judge(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Scores:
    """The oracle's verdict on pictures of 64 x 64, RGB, by their captions."""
    verdicts = [score(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    return Scores(
        captions=len(verdicts),
        score=float(np.mean([verdict.score for verdict in verdicts])),
        all_facts=float(np.mean([verdict.all for verdict in verdicts])),
        by_fact=_by_fact(verdicts),
    )


def _by_fact(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share that holds by kind of fact: "colour 1" and "colour 2" are both of the kind "colour"."""
    kinds = defaultdict(list)
    for verdict in verdicts:
        for name, holds in verdict.facts.items():
            kinds[name.split()[0]].append(holds)
    return {kind: float(np.mean(held)) for kind, held in sorted(kinds.items())}


def evaluate(
    pipeline: StableDiffusionPipeline, count: int, guidances: Sequence[float], *, splits: Sequence[str] = SPLITS
) -> dict[tuple[str, float], Scores]:
    """Scores of `count` captions of each split at each guidance, keyed (split, guidance).

    Every guidance sees the same captions and the same noise.
    """
    scores = {}
    for split in splits:
        captions = captions_of(split, count)
        for guidance in guidances:
            sampler = Sampler(STEPS, guidance, BATCH)
            samples = generate(pipeline, captions, sampler, f"{split}, guidance {guidance:g}")
            scores[split, guidance] = judge(samples.images, captions)
    return scores


def table(scores: dict[tuple[str, float], Scores]) -> str:
    """The scores as a Markdown table, one line for each split and guidance."""
    kinds = sorted({kind for item in scores.values() for kind in item.by_fact})
    head = ["captions", "guidance", "number", "score", "all facts", *kinds]
    lines = [head, ["---"] * len(head)]
    for (split, guidance), item in scores.items():
        shares = [item.score, item.all_facts, *(item.by_fact.get(kind, float("nan")) for kind in kinds)]
        lines.append([split, f"{guidance:g}", str(item.captions), *(f"{share:.3f}" for share in shares)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
