"""The plan's bytes against written ones, at the demo's and at SD-1.x's shapes; and the budget's choice."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, UNet2DConditionModel
from support.stages import reset_accelerate

from pipeline.cache import sizes, trial
from pipeline.cache.trial import Trial
from pipeline.cli import main
from pipeline.commands.plan import cost_of, fit
from pipeline.core.taps import token_stride
from pipeline.evaluation.cost import count_macs
from pipeline.evaluation.training_cost import TrainingCost, training_cost
from pipeline.models.families.sdxl_configs import CONFIGS
from pipeline.models.shapes import TeacherShapes, teacher_shapes
from pipeline.models.students import teacher_taps
from pipeline.models.tokenizer import write_tokenizer
from pipeline.settings.plan import LADDER, PlanSettings, bytes_of
from pipeline.system.disk import format_bytes, require_space
from pipeline.system.echo import PERIODS, format_duration
from pipeline.system.errors import UserError
from shards.calibration import Calibration
from shards.codec import encode_npy
from shards.manifest import Manifest
from shards.packing import pack
from shards.rotated_codec import quantise
from shards.store import open_store
from shards.writer import EntryBuilder, write_shard

# Stable Diffusion 1.x at 512 px: the taps of sd_small in the order of `teacher_taps`.
SD15_TAPS = (
    (320, 32, 32),
    (640, 16, 16),
    (1280, 8, 8),
    (1280, 8, 8),
    (1280, 8, 8),
    (1280, 16, 16),
    (1280, 32, 32),
    (640, 64, 64),
    (320, 64, 64),
)
SD15 = TeacherShapes(
    (4, 64, 64), {"prompt_embeds": (77, 768)}, dict(zip(teacher_taps(("sd_small",)), SD15_TAPS, strict=True))
)


def settings(**changes):
    return PlanSettings(**{"teacher": "demo", "images": 1000, **changes})


def sd15_entry(key, codec, snr_db, tokens):
    """An entry of SD-1.x's shapes with random values, as the teacher stage writes one."""
    draw = np.random.default_rng(3)
    meta = {
        "round": 0,
        "timestep": 501,
        "unconditional": False,
        "taps": {},
    }
    entry = EntryBuilder(key, meta)
    for name in ("noise", "teacher_pred"):
        entry.add_array(name, draw.standard_normal(SD15.latents).astype(np.float16))
    for name, (channels, height, width) in SD15.taps.items():
        s = token_stride(height, width, tokens)
        kept = draw.standard_normal((channels, height // s, width // s), np.float32)
        meta["taps"][name] = {"row": 0, "column": 0}
        if codec == "fp16":
            entry.add_array(f"tap.{name}", kept.astype(np.float16))
        else:
            nothing = Calibration(np.zeros(channels, np.float32), np.eye(channels, dtype=np.float32))
            q, step = quantise(kept, nothing, snr_db, 0)
            meta["taps"][name].update(step=float(step), dither=12345)
            entry.add_compressed(f"tap.{name}", *pack(q))
    return entry


@pytest.mark.parametrize(("codec", "snr_db", "tokens"), [("fp16", 15.0, 0), ("dither", 15.0, 64), ("dither", 5.0, 16)])
def test_the_bytes_of_sd15_are_those_of_a_written_shard(tmp_path, codec, snr_db, tokens):
    entries = [sd15_entry(f"00000000{i}-r0000", codec, snr_db, tokens) for i in range(2)]
    write_shard(open_store(tmp_path), "r0000-s00000.tar", Manifest({}), entries, [])
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    planned = cost_of(settings(codec=codec, snr_db=snr_db, tokens=tokens), SD15).entry
    assert 2 * sizes.stored_bytes(planned) == pytest.approx(written, rel=0.03)


def test_an_array_takes_the_planned_bytes():
    assert sizes.npy_bytes((3, 5, 7), 2) == len(encode_npy(np.zeros((3, 5, 7), np.float16)))


def test_a_budget_goes_into_rounds_of_the_most_exact_entries_that_fit():
    one = cost_of(settings(), SD15).total(1000, 1)
    chosen, why = fit(settings(budget=f"{6 * one / 1e9:.3f}GB"), SD15)
    assert re.fullmatch(r"4 rounds take \S+ [MG]B at 5 dB and 64 tokens; what is left goes into further rounds", why)
    assert (chosen.snr_db, chosen.tokens) == LADDER[0]
    assert chosen.rounds >= 6
    assert cost_of(chosen, SD15).total(1000, chosen.rounds) <= 6 * one
    assert cost_of(chosen, SD15).total(1000, chosen.rounds + 1) > 6 * one


def test_a_small_budget_takes_less_exact_entries_before_fewer_rounds():
    one = cost_of(settings(), SD15).total(1000, 1)
    chosen, why = fit(settings(budget=f"{2 * one / 1e9:.3f}GB", rounds=4), SD15)
    assert " at 5 dB and 64 tokens; " in why
    assert (chosen.snr_db, chosen.tokens) != LADDER[0]
    assert chosen.rounds >= 4


def test_a_budget_for_less_than_the_wanted_rounds_gives_those_that_fit():
    chosen, why = fit(settings(budget="700MB", rounds=50), SD15)
    assert chosen.rounds < 50
    assert why.endswith("so there are fewer rounds")


def test_a_budget_that_holds_nothing_is_refused_with_what_it_takes():
    with pytest.raises(UserError, match="is less than one round of 1000 images, which takes .* MB"):
        fit(settings(budget="1MB"), SD15)


@pytest.mark.parametrize("size", ["500", "GB", "-3GB", "5 apples", "1e3GB"])
def test_an_invalid_size_is_refused(size):
    with pytest.raises(UserError, match="Write it as 500GB"):
        settings(budget=size)


def test_sizes_are_decimal():
    assert bytes_of("1.5TB") == 1_500_000_000_000
    assert [format_bytes(x) for x in (0, 999, 1234567, 2e12)] == ["0 bytes", "999 bytes", "1.23 MB", "2 TB"]


@pytest.mark.usefixtures("remembered_evaluations")
def test_the_command_needs_no_weights(teacher, tmp_path):
    bare = shutil.copytree(teacher, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    result = CliRunner().invoke(
        main, ["plan", "--teacher", str(bare), "--images", "100", "--resolution", "32", "--budget", "50MB"]
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"options that fill 50MB: teacher-cache --rounds \d+ --snr-db 5 --tokens 64\n", result.output)
    assert "\nwhy: 4 rounds take " in result.output


def test_a_disk_that_is_too_small_is_reported_before_anything_is_computed(tmp_path):
    with pytest.raises(UserError, match=r"needs about 1e\+09 TB more, but its disk has only .* free\. Free some space"):
        require_space(tmp_path / "not" / "yet", 10**21, "give fewer --rounds")


@pytest.mark.usefixtures("remembered_evaluations")
@pytest.mark.parametrize("codec", ["dither", "fp16"])
def test_a_trial_runs_the_teacher_and_estimates_the_time(teacher, monkeypatch, codec):
    monkeypatch.setattr(trial, "SECONDS", 0.0)
    result = CliRunner().invoke(
        main,
        [
            "plan",
            "--teacher",
            str(teacher),
            "--images",
            "100",
            "--rounds",
            "3",
            "--resolution",
            "32",
            "--trial",
            "--batch-size",
            "2",
            "--device",
            "cpu",
            "--codec",
            codec,
        ],
    )
    reset_accelerate()
    assert result.exit_code == 0, result.output
    line = result.stdout.splitlines()[-1]
    told = re.fullmatch(
        r"time: about (\S+) (\w+) at (\S+) entries per second, measured with one process on cpu in batches of 2", line
    )
    assert told, line
    length = dict(PERIODS)[told[2]]
    assert float(told[1]) * length * float(told[3]) == pytest.approx(300, rel=0.02)


def test_where_the_two_overlap_the_slower_decides():
    assert Trial(running=3.0, compressing=1.0, overlaps=True).seconds(10) == 30
    assert Trial(running=3.0, compressing=1.0, overlaps=False).seconds(10) == 40


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.5, "0.5 seconds"), (119, "119 seconds"), (300, "5 minutes"), (86400 * 3, "3 days")]
)
def test_a_time_in_words(seconds, words):
    assert format_duration(seconds) == words


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [("12B", 12), ("5KB", 5000), ("5kib", 5120), ("1.5 GB", 1_500_000_000), ("2TiB", 2 << 40), ("1PB", 10**15)],
)
def test_a_size_may_have_any_usual_unit(size, bytes_):
    assert bytes_of(size) == bytes_


@pytest.mark.parametrize("given", [{"snr_db": 10.0}, {"snr_db": 12.5}, {"tokens": 128}, {"tokens": 64}])
def test_a_budget_keeps_what_is_given_even_where_the_rounds_do_not_fit(given):
    """5 dB would fit four rounds; what is asked for counts more, also where it is the default."""
    one = cost_of(settings(), SD15).total(1000, 1)
    chosen, _ = fit(settings(budget=f"{3 * one / 1e9:.3f}GB", rounds=4, **given), SD15)
    assert {name: getattr(chosen, name) for name in given} == given
    assert cost_of(chosen, SD15).total(1000, chosen.rounds) <= 3 * one


def test_a_large_budget_goes_no_further_than_all_timesteps():
    assert fit(settings(budget="1PB"), SD15)[0].rounds == 1000
    assert fit(settings(budget="1PB", rounds=1200), SD15)[0].rounds == 1200


def test_the_arithmetic_of_training_from_a_cache_is_that_of_the_two_trainers():
    """SD-1.x at 512 px: MACs in billions, of which students.md has the U-Nets'. Sums by hand."""
    cost = TrainingCost(541, 402, {"sd_small": 262})
    assert 1 / cost.share_of_online(8, 1) == pytest.approx((541 + 402 + 786) / (541 / 8 + 402 + 786))
    assert [round(1 / cost.share_of_online(8, visits), 2) for visits in (1, 2, 4)] == [1.38, 1.69, 1.91]
    both = TrainingCost(541, 402, {"sd_small": 262, "sd_tiny": 243})
    online = 2 * 2 * (2 * (541 + 402) + 3 * (262 + 243))
    assert both.share_of_online(2, 2) == pytest.approx((541 + 2 * 402 + 2 * 2 * 3 * (262 + 243)) / online)


def test_online_training_takes_as_much_at_the_break_even():
    cost, images, rounds = TrainingCost(500, 400, {"sd_small": 200, "sd_tiny": 100}), 90, 4
    samples = cost.break_even(images, rounds)
    online = samples * (2 * (500 + 400) + 3 * 300)
    assert images * (500 + rounds * 400) + samples * 3 * 300 == pytest.approx(online, rel=1e-2)


def test_the_plan_counts_what_the_networks_compute(teacher):
    """The same networks loaded and called by diffusers, on the meta device: not all CPU kernels are counted."""
    shapes = teacher_shapes(teacher, 32, teacher_taps(("sd_small",)))
    cost = training_cost(teacher, 32, shapes, ("sd_small", "sd_tiny"))
    unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet").to("meta")
    inputs = torch.zeros(1, *shapes.latents), torch.zeros(1), torch.zeros(1, *shapes.conditioning["prompt_embeds"])
    assert cost.teacher == count_macs(unet, *(tensor.to("meta") for tensor in inputs))
    assert cost.teacher > cost.students["sd_small"] > cost.students["sd_tiny"] > 0
    vae = AutoencoderKL.from_pretrained(teacher, subfolder="vae").to("meta")
    assert cost.vae_encoder == count_macs(vae.encode, torch.zeros(1, 3, 32, 32, device="meta"))
    result = CliRunner().invoke(main, ["plan", "--teacher", str(teacher), "--images", "100", "--resolution", "32"])
    assert f"when each student trains on more than {cost_of_sd_small(cost).break_even(100, 4)} samples" in result.output


@pytest.fixture(scope="module")
def sdxl_configs(tmp_path_factory):
    """A folder with SDXL's configs and tokenizers, and no weights."""
    folder = tmp_path_factory.mktemp("sdxl")
    for name, config in CONFIGS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    for tokenizer in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / tokenizer)
    return folder


def test_sdxl_at_1024_px_is_planned_from_configs_alone(sdxl_configs):
    """The bytes of what is not quantised, by hand: 128 each for the header, and fp16 or, for six numbers, int32."""
    arguments = ["plan", "--teacher", sdxl_configs, "--images", 1000, "--rounds", 8, "--resolution", 1024]
    result = CliRunner().invoke(main, [str(a) for a in (*arguments, "--students", "koala_700m")])
    reset_accelerate()
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.startswith("  ")}
    latents = 128 + 2 * 4 * 128 * 128
    assert lines["noise"].split()[1] == lines["teacher_pred"].split()[1] == f"{latents:,}"
    conditioning = {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,), "time_ids": (6,)}
    image = sizes.latents_entry((4, 128, 128), conditioning, {"time_ids": "int32"})
    assert image["prompt_embeds"] == 128 + 2 * 77 * 2048
    assert image["pooled_prompt_embeds"] == 128 + 2 * 1280
    assert image["time_ids"] == 128 + 4 * 6
    assert f"latents: {sizes.stored_bytes(image):,} bytes per image" in result.output
    assert "up_blocks.2: 8 x 8 of 128 x 128, stride 16" in result.output
    assert "down_blocks.2: 8 x 8 of 32 x 32, stride 4" in result.output
    assert "mid_block" not in result.output
    assert "arithmetic of both stages for koala_700m" in result.output


def cost_of_sd_small(cost: TrainingCost) -> TrainingCost:
    return replace(cost, students={"sd_small": cost.students["sd_small"]})
