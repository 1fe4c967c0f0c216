"""How well a pipeline follows captions of scenes: the oracle checks the facts of each caption in a generated image.

captions -> images (DPM-Solver++, 25 steps) -> oracle -> share of facts that hold
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from pipeline.demo.oracle import Verdict, score
from pipeline.demo.scenes import SPLITS, caption_of, draw_facts, generator
from pipeline.sampling.generate import Sampler, generate

STEPS = 25
BATCH = 50
# Far from the small seeds of the training scenes.
EVALUATION_SEED = 1_000_000


@dataclass(frozen=True)
class Scores:
    """Results over `captions` captions, with all shares from 0 to 1.

    `score` is the mean over captions of the share of facts that hold, `all_facts` is the share of captions whose facts
    all hold, and `by_fact` is the share that holds of each kind of fact. Captions differ in their number of facts, so
    `score` differs a little from the share over all facts.
    """

    captions: int
    score: float
    all_facts: float
    by_fact: dict[str, float]


def captions_of(split: str, count: int, seed: int = EVALUATION_SEED) -> list[str]:
    """Captions 0..count-1 of a split ("train" or "heldout"), without rendering their images."""
    return [caption_of(draw_facts(generator(seed, index, split), split)) for index in range(count)]


def judge(images: Sequence[Image.Image], captions: Sequence[str]) -> Scores:
    """The oracle's scores for 64 x 64 RGB images, each judged by its caption."""
    verdicts = [score(image, caption) for image, caption in zip(images, captions, strict=True)]
    return Scores(
        captions=len(verdicts),
        score=float(np.mean([verdict.score for verdict in verdicts])),
        all_facts=float(np.mean([verdict.all for verdict in verdicts])),
        by_fact=_by_fact(verdicts),
    )


def _by_fact(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The share that holds of each kind of fact. "colour 1" and "colour 2" are both of the kind "colour"."""
    kinds: defaultdict[str, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        for name, holds in verdict.facts.items():
            kinds[name.split()[0]].append(holds)
    return {kind: float(np.mean(held)) for kind, held in sorted(kinds.items())}


def evaluate(
    pipeline: DiffusionPipeline, count: int, guidances: Sequence[float], *, splits: Sequence[str] = SPLITS
) -> dict[tuple[str, float], Scores]:
    """Scores for `count` captions per split and guidance scale, keyed by (split, guidance).

    All guidance scales get the same captions and the same noise.
    """
    scores = {}
    for split in splits:
        captions = captions_of(split, count)
        for guidance in guidances:
            sampler = Sampler(STEPS, guidance, BATCH)
            generated = generate(pipeline, captions, sampler, f"{split}, guidance {guidance:g}")
            scores[split, guidance] = judge(generated.images, captions)
    return scores


def table(scores: dict[tuple[str, float], Scores]) -> str:
    """The scores as a Markdown table, with one line per split and guidance scale."""
    kinds = sorted({kind for item in scores.values() for kind in item.by_fact})
    head = ["captions", "guidance", "number", "score", "all facts", *kinds]
    lines = [head, ["---"] * len(head)]
    for (split, guidance), item in scores.items():
        shares = [item.score, item.all_facts, *(item.by_fact.get(kind, float("nan")) for kind in kinds)]
        lines.append([split, f"{guidance:g}", str(item.captions), *(f"{share:.3f}" for share in shares)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
