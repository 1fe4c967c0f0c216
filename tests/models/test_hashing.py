"""What a network computes is known by its weights and by what its config decides, however its files state it."""

import shutil

import pytest
from diffusers import UNet2DConditionModel
from support.edited import change_json, swap_tokens
from support.tiny import tiny_pipeline
from transformers import CLIPTextConfig, CLIPTokenizer

from pipeline.cache.latents import encoders_spec, other_part
from pipeline.models.bundled import TEACHER
from pipeline.models.families.sd import SD
from pipeline.models.hashing import as_stated, config_of, deciding, stated_once, tokenizer_sha256
from pipeline.models.load import load_base, load_unet


@pytest.fixture
def model(teacher, tmp_path):
    return shutil.copytree(teacher, tmp_path / "model")


def identity(folder):
    base = load_base(folder)
    return {**encoders_spec(base, SD), "teacher_config": config_of(load_unet(folder, None))}


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"act_fn": "silu", "_diffusers_version": "0.1", "_name_or_path": "x", "sample_size": 8}),
        ("vae/config.json", {"scaling_factor": 0.18215, "force_upcast": False, "sample_size": 64, "something": 1}),
        ("text_encoder/config.json", {"hidden_act": "quick_gelu", "layer_norm_eps": 0.00001, "eos_token_id": 2}),
        ("text_encoder/config.json", {"torch_dtype": "float16", "transformers_version": "4.1", "projection_dim": 10}),
    ],
)
def test_defaults_and_what_decides_nothing_make_no_other_network(model, file, changes):
    before = identity(model)
    change_json(model / file, **changes)
    assert identity(model) == before


@pytest.mark.parametrize(
    ("file", "changes", "part"),
    [
        ("vae/config.json", {"scaling_factor": 0.2}, ("VAE", ": their config.json differ in scaling_factor")),
        ("vae/config.json", {"act_fn": "relu"}, ("VAE", ": their config.json differ in act_fn")),
        (
            "text_encoder/config.json",
            {"hidden_act": "gelu", "num_attention_heads": 1},
            ("text encoder", ": their config.json differ in num_attention_heads, hidden_act"),
        ),
        (
            "text_encoder/config.json",
            {"use_attention_mask": True},
            ("text encoder", ": their config.json differ in use_attention_mask"),
        ),
        ("tokenizer/tokenizer_config.json", {"padding_side": "left"}, ("tokenizer", "")),
        ("tokenizer/tokenizer_config.json", {"pad_token": "a</w>"}, ("tokenizer", "")),
    ],
)
def test_a_key_that_decides_makes_another_part(model, file, changes, part):
    before = identity(model)
    change_json(model / file, **changes)
    name, what = other_part(before, identity(model))
    assert (name, set(what.replace(",", "").split())) == (part[0], set(part[1].replace(",", "").split()))


def test_what_an_earlier_version_did_not_state_counts_as_the_same(model):
    earlier = {key: value for key, value in identity(model).items() if key not in ("configs", "tokenizer_sha256")}
    change_json(model / "vae/config.json", act_fn="relu")
    swap_tokens(model / "tokenizer")
    assert other_part(earlier, identity(model)) is None
    assert other_part(identity(model), earlier) is None
    change_json(model / "vae/config.json", scaling_factor=1.0)
    assert other_part(earlier, identity(model)) == ("VAE", ": their config.json differ in scaling_factor")


def test_a_config_is_stated_as_json_has_it():
    stated = {"block_out_channels": (8, 16), "norm_eps": float("nan"), "act_fn": "silu", "num_attention_heads": None}
    assert deciding(UNet2DConditionModel, stated) == {"block_out_channels": [8, 16], "norm_eps": "NaN"}
    assert deciding(CLIPTextConfig, CLIPTextConfig().to_dict()) == {}


@pytest.mark.parametrize(
    ("key", "number", "for_each", "other"),
    [
        ("attention_head_dim", 8, [8, 8, 8, 8], [5, 10, 20, 20]),
        ("attention_head_dim", 4, [4, 4, 4, 4], [8, 8, 8, 8]),
        ("layers_per_block", 2, [2, 2, 2, 2], [2, 2, 2, 1]),
        ("transformer_layers_per_block", 3, [3, 3, 3, 3], [[3, 3], [3, 3], [3, 3], [3, 3]]),
        ("cross_attention_dim", 768, [768, 768, 768, 768], 1024),
    ],
)
def test_a_number_for_each_block_alike_means_that_number_for_all(key, number, for_each, other):
    once, each, different = (deciding(UNet2DConditionModel, {key: value}) for value in (number, for_each, other))
    assert stated_once(once) == stated_once(each) != stated_once(different)
    assert as_stated(once, each) == each
    assert as_stated(different, each) == different
    assert as_stated(once, None) == once


@pytest.mark.parametrize("source", ["tiny", "demo"])
def test_a_tokenizer_is_the_same_from_whatever_files(tmp_path, source):
    folder = TEACHER / "tokenizer"
    if source == "tiny":
        tiny_pipeline().tokenizer.save_pretrained(tmp_path / "tiny")
        folder = tmp_path / "tiny"
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    expected = tokenizer_sha256(tokenizer)
    tokenizer(["a text", "b"], padding="max_length", max_length=5, truncation=True)
    assert tokenizer_sha256(tokenizer) == expected
    tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_sha256(CLIPTokenizer.from_pretrained(tmp_path / "again")) == expected
    swap_tokens(tmp_path / "again")
    assert tokenizer_sha256(CLIPTokenizer.from_pretrained(tmp_path / "again")) != expected


def test_merges_are_part_of_a_tokenizer():
    def tokenizer(*merges):
        tokens = ["a", "b", "b</w>", "ab", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
        return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=list(merges))

    hashes = {tokenizer_sha256(tokenizer(*merges)) for merges in ([], [("a", "b")], [("a", "b"), ("a", "b</w>")])}
    assert len(hashes) == 3
