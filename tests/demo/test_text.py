"""The text encoder's task: to give the facts of a caption, by colour and by place."""

import pytest
import torch

from pipeline.demo.evaluate import captions_of
from pipeline.demo.networks import TEXT_WIDTH, make_text_encoders, make_tokenizer
from pipeline.demo.scenes import RELATIONS, parse_caption
from pipeline.demo.text import PLACES, QUERIES, VALUES, Reader, answers_of, reading_loss, things_of
from pipeline.models.families.clip import tokenize


def words(caption, query):
    """The answers to one query, as words, or None for no answer."""
    answers = answers_of(parse_caption(caption))[QUERIES.index(query)].tolist()
    return {kind: values[a - 1] if a else None for a, (kind, values) in zip(answers, VALUES.items(), strict=True)}


def share_read(logits: dict[str, torch.Tensor], answers: torch.Tensor) -> float:
    """The share of captions with only correct answers."""
    right = torch.stack([values.argmax(dim=-1) for values in logits.values()], dim=-1) == answers
    return right.flatten(1).all(dim=1).float().mean().item()


def test_a_colour_and_a_place_can_ask_for_the_same_thing():
    caption = "a red circle above a blue square on a yellow background"
    circle = {"colour": "red", "shape": "circle", "count": 1, "size": None, "place": "top"}
    assert words(caption, ("colour", "red")) == words(caption, ("place", "top")) == circle
    assert words(caption, ("place", "bottom"))["shape"] == "square"
    assert words(caption, ("colour", "yellow"))["place"] == "background"
    assert not any(words(caption, ("colour", "green")).values())
    assert not any(words(caption, ("place", "left")).values())


def test_count_and_size_are_answered():
    assert words("three red stars on a gray background", ("colour", "red"))["count"] == 3
    assert words("a small red star on a gray background", ("place", "anywhere"))["size"] == "small"


def test_every_relation_has_its_places():
    assert set(PLACES) == set(RELATIONS)
    opposite = {"above": "below", "left of": "right of"}
    for relation, reverse in opposite.items():
        assert PLACES[relation] == PLACES[reverse][::-1]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_no_two_things_of_a_caption_share_a_colour_or_a_place(split):
    for caption in captions_of(split, 200):
        things = things_of(parse_caption(caption))
        for kind in ("colour", "place"):
            assert len({thing[kind] for thing in things}) == len(things), caption


def test_a_reader_and_a_text_encoder_can_memorise_captions():
    captions = captions_of("train", 6)
    tokenizer = make_tokenizer()
    tokens = tokenize(tokenizer, captions).input_ids
    answers = torch.stack([answers_of(parse_caption(caption)) for caption in captions])
    torch.manual_seed(0)
    text_encoder, reader = make_text_encoders(tokenizer)["text_encoder"], Reader(TEXT_WIDTH)
    optimizer = torch.optim.AdamW([*text_encoder.parameters(), *reader.parameters()], lr=1e-3)
    before = share_read(reader(text_encoder(tokens)[0]), answers)
    for _ in range(200):
        optimizer.zero_grad()
        reading_loss(reader(text_encoder(tokens)[0]), answers).backward()
        optimizer.step()
    assert before == 0
    assert share_read(reader(text_encoder(tokens)[0]), answers) == 1
