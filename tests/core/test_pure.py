"""Draws, diffusion maths, taps and losses, against diffusers, scipy-free statistics and closed forms."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from support.tiny import tiny_unet

from pipeline.core import diffusion, draws
from pipeline.core.losses import distillation_losses, mse, relative_mse, total_loss
from pipeline.core.taps import Taps, as_map, sample_tokens, token_stride
from shards.expected import offsets

T = 1000


class TestDraws:
    def test_a_draw_depends_on_all_four_and_on_nothing_else(self):
        named = {
            (seed, name, r, purpose): draws.generator(seed, name, r, purpose).random()
            for seed, name, r, purpose in itertools.product((0, 1), ("a", "b"), (0, 1), ("noise", "crop"))
        }
        assert len(set(named.values())) == len(named)
        np.random.seed(7)
        torch.manual_seed(7)
        assert all(draws.generator(*key).random() == value for key, value in named.items())

    def test_names_that_run_together_stay_apart(self):
        assert draws.generator(1, "1", 0, "x").random() != draws.generator(11, "", 0, "x").random()

    @pytest.mark.parametrize("strata", [1, 2, 3, 4, 7])
    def test_over_its_rounds_each_image_gets_one_timestep_of_each_part(self, strata):
        for image in range(200):
            steps = [draws.timestep(0, str(image), r, strata, T) for r in range(strata)]
            for part, step in enumerate(sorted(steps)):
                assert int(part * T / strata) <= step < (part + 1) * T / strata

    @pytest.mark.parametrize(("strata", "rounds"), [(1, 8), (2, 8), (4, 8), (4, 16)])
    def test_rounds_added_later_fall_between_the_earlier_ones(self, strata, rounds):
        for image in range(100):
            steps = [draws.timestep(0, str(image), r, strata, T * 1000) for r in range(rounds)]
            assert sorted(step * rounds // (T * 1000) for step in steps) == list(range(rounds))

    @pytest.mark.parametrize(("strata", "round_index"), [(1, 0), (4, 0), (4, 3), (4, 5), (3, 1)])
    def test_each_round_alone_is_uniform(self, strata, round_index):
        steps = np.array([draws.timestep(3, str(i), round_index, strata, T) for i in range(20_000)])
        assert steps.min() >= 0
        assert steps.max() < T
        histogram = np.histogram(steps, bins=20, range=(0, T))[0]
        # Chi-square with 19 degrees of freedom: 60 is beyond the 1 - 4e-6 quantile.
        assert (np.square(histogram - 1000) / 1000).sum() < 60

    def test_the_radical_inverse_is_the_van_der_corput_sequence(self):
        assert [draws.radical_inverse(i) for i in range(6)] == [0, 0.5, 0.25, 0.75, 0.125, 0.625]

    def test_noise_is_standard_normal_and_the_offset_adds_to_channels(self):
        plain = np.stack([draws.noise(0, str(i), 0, (4, 16, 16), 0.0) for i in range(200)])
        assert plain.mean() == pytest.approx(0, abs=0.01)
        assert plain.var() == pytest.approx(1, abs=0.01)
        moved = np.stack([draws.noise(0, str(i), 0, (4, 16, 16), 0.5) for i in range(200)])
        assert (moved - plain).std(axis=(2, 3)).max() < 1e-6
        assert (moved - plain).mean(axis=(2, 3)).var() == pytest.approx(0.25, abs=0.04)

    def test_the_share_of_unconditional_entries(self):
        drawn = [draws.is_unconditional(0, str(i), 0, 0.1) for i in range(10_000)]
        assert np.mean(drawn) == pytest.approx(0.1, abs=0.015)
        assert not any(draws.is_unconditional(0, str(i), 0, 0.0) for i in range(1000))
        assert all(draws.is_unconditional(0, str(i), 0, 1.0) for i in range(1000))

    def test_token_offsets_cover_the_cell_evenly(self):
        drawn = [draws.token_offset(0, str(i), 0, "up_blocks.3", 2, 2) for i in range(4000)]
        counts = [drawn.count(cell) for cell in itertools.product(range(2), repeat=2)]
        assert min(counts) > 900


class TestDiffusion:
    def inputs(self):
        torch.manual_seed(0)
        return torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8), torch.tensor([0, 1, 250, 500, 998, 999])

    @pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
    def test_noising_and_velocity_are_those_of_diffusers(self, schedule):
        latents, noise, timesteps = self.inputs()
        oracle = DDPMScheduler(beta_schedule=schedule, beta_start=0.00085, beta_end=0.012)
        noisy = diffusion.add_noise(latents, noise, timesteps, oracle.alphas_cumprod)
        torch.testing.assert_close(noisy, oracle.add_noise(latents, noise, timesteps))
        velocity = diffusion.target(latents, noise, timesteps, oracle.alphas_cumprod, "v_prediction")
        torch.testing.assert_close(velocity, oracle.get_velocity(latents, noise, timesteps))
        assert torch.equal(diffusion.target(latents, noise, timesteps, oracle.alphas_cumprod, "epsilon"), noise)

    def test_half_precision_input_is_noised_in_float32(self):
        latents, noise, timesteps = self.inputs()
        alphas = DDPMScheduler().alphas_cumprod
        noisy = diffusion.add_noise(latents.half(), noise.half(), timesteps, alphas)
        assert noisy.dtype == torch.float32
        assert torch.equal(noisy, diffusion.add_noise(latents.half().float(), noise.half().float(), timesteps, alphas))

    @pytest.mark.parametrize(("prediction_type", "added"), [("epsilon", 0), ("v_prediction", 1)])
    def test_min_snr_weights_are_those_of_diffusers_training_scripts(self, prediction_type, added):
        scheduler = DDPMScheduler()
        timesteps = torch.tensor([0, 10, 400, 999])
        snr = compute_snr(scheduler, timesteps)
        weights = diffusion.min_snr_weights(timesteps, scheduler.alphas_cumprod, 5.0, prediction_type)
        torch.testing.assert_close(weights, snr.clamp(max=5.0) / (snr + added))

    @pytest.mark.parametrize(("prediction_type", "limit"), [("epsilon", 1.0), ("v_prediction", 0.0)])
    def test_min_snr_weights_have_their_limits_where_there_is_no_signal_or_no_noise(self, prediction_type, limit):
        alphas_cumprod = torch.tensor([0.0, 1e-30, 1.0])
        weights = diffusion.min_snr_weights(torch.arange(3), alphas_cumprod, 5.0, prediction_type)
        torch.testing.assert_close(weights, torch.tensor([limit, limit, 0.0]))

    def test_an_unknown_prediction_type_is_an_error(self):
        with pytest.raises(ValueError, match="'sample'"):
            diffusion.target(*self.inputs(), DDPMScheduler().alphas_cumprod, "sample")


class TestTaps:
    def forward(self, unet):
        torch.manual_seed(0)
        return unet(torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), encoder_hidden_states=torch.randn(2, 8, 10))

    def test_taps_are_the_modules_outputs_and_silent_outside_a_recording(self):
        unet = tiny_unet().eval()
        taps = Taps(unet, ["down_blocks.0", "mid_block", "down_blocks.2.attentions.1.proj_out"])
        seen = {}
        unet.mid_block.register_forward_hook(lambda m, i, output: seen.update(mid=output))
        unet.down_blocks[0].register_forward_hook(lambda m, i, output: seen.update(down=output[0]))
        self.forward(unet)
        with taps.recording() as features:
            assert features == {}
            self.forward(unet)
        assert torch.equal(features["mid_block"], seen["mid"])
        assert torch.equal(features["down_blocks.0"], seen["down"])
        assert features["down_blocks.0"].shape == (2, 8, 8, 8)
        before = dict(features)
        self.forward(unet)
        assert all(features[name] is before[name] for name in before)
        taps.remove()
        with taps.recording() as features:
            self.forward(unet)
        assert features == {}

    def test_tokens_become_a_map(self):
        tokens = torch.arange(2 * 9 * 5.0).view(2, 9, 5)
        features = as_map(tokens)
        assert features.shape == (2, 5, 3, 3)
        assert torch.equal(features[1, :, 2, 0], tokens[1, 6])

    def test_tokens_lie_as_in_the_input(self):
        tokens = torch.arange(2 * 16 * 5.0).view(2, 16, 5)
        # 16 tokens of an input of 32 x 8 are 8 x 2, and no square. A side of 15 is halved to 8.
        for size in [(32, 8), (8, 2), (15, 3)]:
            features = as_map(tokens, size)
            assert features.shape == (2, 5, 8, 2)
            assert torch.equal(features[1, :, 3, 1], tokens[1, 7])
        with pytest.raises(ValueError, match="16 tokens are no map of an input of"):
            as_map(tokens, (9, 9))

    @torch.no_grad()
    def test_taps_of_tokens_are_maps_of_any_shape(self):
        unet = tiny_unet(use_linear_projection=True).eval()
        taps = Taps(unet, ["down_blocks.2.attentions.0.proj_out", "down_blocks.2"])
        noisy = torch.randn(1, 4, 12, 20)
        with taps.recording(noisy) as features:
            unet(noisy, torch.tensor([3]), encoder_hidden_states=torch.randn(1, 8, 10))
        assert features["down_blocks.2.attentions.0.proj_out"].shape == (1, 16, 3, 5)

    @pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 9), (8, 10), (5, 11)])
    @pytest.mark.parametrize("stride", [2, 4])
    def test_the_sampled_loss_is_the_full_one_in_expectation(self, stride, height, width):
        """The mean over all offsets of the sampled MSE is exactly the full MSE, whether or not the stride divides."""
        torch.manual_seed(0)
        a, b = torch.randn(1, 3, height, width), torch.randn(1, 3, height, width)
        cells = list(itertools.product(range(offsets(height, stride)), range(offsets(width, stride))))
        assert sample_tokens(a, [0], [0], stride).shape == (1, 3, height // stride, width // stride)
        sampled = [mse(sample_tokens(a, [r], [c], stride), sample_tokens(b, [r], [c], stride)) for r, c in cells]
        torch.testing.assert_close(sum(sampled) / len(sampled), mse(a, b))

    def test_each_entry_has_its_own_offset(self):
        features = torch.arange(2 * 16.0).view(2, 1, 4, 4)
        sampled = sample_tokens(features, [0, 1], [1, 0], 2)
        assert sampled[0, 0].tolist() == [[1, 3], [9, 11]]
        assert sampled[1, 0].tolist() == [[20, 22], [28, 30]]

    def test_at_least_so_many_positions_are_kept_and_as_few_as_that_allows(self):
        assert [token_stride(side, side, 64) for side in (64, 32, 16, 8, 4)] == [8, 4, 2, 1, 1]
        assert [token_stride(16, 16, tokens) for tokens in (1, 2, 16, 17, 25, 26, 256)] == [16, 8, 4, 3, 3, 2, 1]
        assert token_stride(32, 48, 1) == 32
        assert token_stride(64, 32, 64) == 5

    def test_all_positions_are_kept_for_none_or_more_than_there_are(self):
        assert token_stride(64, 64, 0) == 1
        assert token_stride(64, 64, 5000) == 1


class TestLosses:
    def test_half_precision_neither_overflows_nor_underflows(self):
        a, b = torch.full((8,), 300.0, dtype=torch.float16), torch.zeros(8, dtype=torch.float16)
        assert mse(a, b).item() == 90_000
        small = torch.full((8,), 1e-4, dtype=torch.float16)
        assert mse(small, b).item() == pytest.approx(1e-8, rel=1e-2)

    def test_terms_and_their_weights(self):
        one, two, three = (torch.full((2, 4, 8, 8), float(v)) for v in (1, 2, 3))
        terms = distillation_losses(
            one, two, three, {"s": one, "t": two}, {"S": three, "T": three}, (("s", "S"), ("t", "T"))
        )
        assert {name: term.item() for name, term in terms.items()} == {
            "task": 1,
            "output": 4,
            "feature/s": 4,
            "feature/t": 1,
        }
        assert total_loss(terms, 0.5, 0.25).item() == 1 + 0.5 * 4 + 0.25 * 5

    def test_the_relative_loss_is_each_entrys_share_of_the_teachers_power(self):
        generator = torch.Generator().manual_seed(0)
        teacher = torch.randn(3, 4, 8, 8, generator=generator) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1, 1)
        assert relative_mse(torch.zeros_like(teacher), teacher).item() == pytest.approx(1)
        assert relative_mse(teacher * 1.5, teacher).item() == pytest.approx(0.25)
        halves = [relative_mse(teacher[part] * 2, teacher[part]) for part in (slice(0, 1), slice(1, 3))]
        assert (halves[0] + 2 * halves[1]).item() / 3 == pytest.approx(relative_mse(teacher * 2, teacher).item())
        assert relative_mse(teacher * 0, teacher * 0).item() == 0

    def test_the_chosen_feature_loss_is_used(self):
        one, three = torch.full((2, 4, 8, 8), 1.0), torch.full((2, 4, 8, 8), 3.0)
        terms = distillation_losses(one, one, None, {"s": one}, {"S": three}, (("s", "S"),), "relative")
        assert terms["feature/s"].item() == pytest.approx(4 / 9)

    def test_omitted_parts_have_no_terms(self):
        one = torch.ones(1, 4, 2, 2)
        terms = distillation_losses(one, one, None, {}, {}, ())
        assert list(terms) == ["task"]
        assert total_loss(terms, 0.5, 0.5) is terms["task"]
