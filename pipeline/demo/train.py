"""Trains the demo teacher: autoencoder first, then text encoder and U-Net together on its latents.

    scenes -> autoencoder -> latents -> text encoder + U-Net (averaged weights) -> diffusers pipeline

Everything on the way lies in the work folder. Running the same command again goes on from there.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from pipeline.demo.networks import (
    LATENT_SIDE,
    make_autoencoder,
    make_noise_scheduler,
    make_pipeline,
    make_text_encoder,
    make_tokenizer,
    make_unet,
)
from pipeline.demo.scenes import SIDE, make_scene


@dataclass(frozen=True)
class Settings:
    """How the teacher is trained. Raises ValueError at construction for a setting that cannot work."""

    seed: int = 0
    scenes: int = 24000
    autoencoder_steps: int = 3800
    autoencoder_batch: int = 16
    steps: int = 5000
    batch: int = 32
    learning_rate: float = 1.5e-3
    kl_weight: float = 2e-4
    caption_dropout: float = 0.1
    min_snr_gamma: float = 5.0
    ema_decay: float = 0.998
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        for name in ("scenes", "autoencoder_steps", "autoencoder_batch", "steps", "batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout is {self.caption_dropout}; it must lie in [0, 1)")


def render_scenes(work: Path, settings: Settings) -> tuple[np.ndarray, list[str]]:
    """The training scenes: pictures, uint8 (N, 64, 64, 3), mapped from a file, and their captions."""
    pictures_file, captions_file = work / "pictures.npy", work / "captions.json"
    if not captions_file.exists():
        shape = (settings.scenes, SIDE, SIDE, 3)
        pictures = np.lib.format.open_memmap(pictures_file, mode="w+", dtype=np.uint8, shape=shape)
        captions = []
        for index in tqdm(range(settings.scenes), desc="scenes", unit="picture"):
            scene = make_scene(settings.seed, index)
            pictures[index] = scene.picture
            captions.append(scene.caption)
        pictures.flush()
        captions_file.write_text(json.dumps(captions), encoding="utf-8")
    return np.load(pictures_file, mmap_mode="r"), json.loads(captions_file.read_text(encoding="utf-8"))


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], channels last in memory."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


class Trainer:
    """Optimiser, learning rate, averaged weights and checkpoints of one module, by step number.

    The learning rate warms up over 100 steps and falls to zero along a half cosine.
    """

    def __init__(self, module: nn.Module, file: Path, steps: int, learning_rate: float, settings: Settings) -> None:
        self.module, self.file, self.steps, self.settings = module, file, steps, settings
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._learning_rate_factor)
        self.average = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.step = 0
        if file.exists():
            self._load()

    def _learning_rate_factor(self, step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / self.steps)))

    def remaining(self, name: str) -> Iterator[int]:
        """Step numbers still to do, with a progress bar. Randomness is reseeded from the step number."""
        with tqdm(total=self.steps, initial=self.step, desc=name, unit="step", mininterval=5) as bar:
            while self.step < self.steps:
                torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
                yield self.step
                bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
                bar.update()
        self._save()

    def update(self, loss: torch.Tensor) -> None:
        """One step down the gradient of `loss`, a scalar."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.loss = loss.item()
        self.step += 1
        # A young average forgets faster, so that it does not carry the initial weights along.
        decay = min(self.settings.ema_decay, self.step / (self.step + 10))
        with torch.no_grad():
            for name, value in self.module.state_dict().items():
                self.average[name].lerp_(value, 1 - decay) if value.is_floating_point() else None
        if self.step % self.settings.checkpoint_every == 0:
            self._save()

    def _save(self) -> None:
        state = {
            "step": self.step,
            "module": self.module.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
        }
        unfinished = self.file.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(self.file)

    def _load(self) -> None:
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        self.step, self.average = state["step"], state["average"]
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])


def train_autoencoder(work: Path, settings: Settings) -> nn.Module:
    """Pictures -> an autoencoder trained on absolute and squared error, with its latents held near N(0, 1)."""
    pictures, _ = render_scenes(work, settings)
    torch.manual_seed(settings.seed)
    autoencoder = make_autoencoder().to(memory_format=torch.channels_last)
    trainer = Trainer(autoencoder, work / "autoencoder.pt", settings.autoencoder_steps, 2e-3, settings)
    for _ in trainer.remaining("autoencoder"):
        pixels = to_pixels(pictures[torch.randint(len(pictures), (settings.autoencoder_batch,)).numpy()])
        posterior = autoencoder.encode(pixels).latent_dist
        decoded = autoencoder.decode(posterior.sample()).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + settings.kl_weight * divergence
        trainer.update(loss)
    autoencoder.load_state_dict(trainer.average)
    return autoencoder.eval().requires_grad_(False)


def encode_latents(work: Path, autoencoder: nn.Module, settings: Settings) -> tuple[np.ndarray, float]:
    """The posterior's mean and standard deviation of every picture, float16 (N, 8, 16, 16), and their scale.

    The scale brings sampled latents to unit variance; it becomes the autoencoder's `scaling_factor`.
    """
    pictures, _ = render_scenes(work, settings)
    file = work / "latents.npy"
    if not file.exists():
        encoded = []
        with torch.inference_mode():
            for start in tqdm(range(0, len(pictures), 64), desc="latents", unit="batch", mininterval=5):
                posterior = autoencoder.encode(to_pixels(pictures[start : start + 64])).latent_dist
                encoded.append(torch.cat((posterior.mean, posterior.std), dim=1).half().numpy())
        np.save(file, np.concatenate(encoded))
    latents = np.load(file)
    mean, deviation = latents[:4000, :4].astype(np.float32), latents[:4000, 4:].astype(np.float32)
    return latents, float(1 / np.sqrt(mean.var() + np.square(deviation).mean()))


def train_diffusion(work: Path, settings: Settings) -> StableDiffusionPipeline:
    """The text encoder and the U-Net, together, on the latents of a trained autoencoder.

    Noise prediction with Min-SNR weights (Hang et al. 2023); some captions are left empty, for
    classifier-free guidance. Returns the pipeline with averaged weights.
    """
    autoencoder = train_autoencoder(work, settings)
    latents, scale = encode_latents(work, autoencoder, settings)
    autoencoder.register_to_config(scaling_factor=scale)
    _, captions = render_scenes(work, settings)
    tokenizer, noise_scheduler = make_tokenizer(), make_noise_scheduler()
    tokens = tokenize(tokenizer, [*captions, ""])
    torch.manual_seed(settings.seed)
    networks = nn.ModuleDict({"text_encoder": make_text_encoder(tokenizer), "unet": make_unet()})
    networks.to(memory_format=torch.channels_last).train()
    alphas = noise_scheduler.alphas_cumprod
    trainer = Trainer(networks, work / "diffusion.pt", settings.steps, settings.learning_rate, settings)
    for _ in trainer.remaining("diffusion"):
        index = torch.randint(len(captions), (settings.batch,))
        posterior = torch.from_numpy(latents[index.numpy()]).float()
        sampled = (
            posterior[:, :4] + posterior[:, 4:] * torch.randn(settings.batch, 4, LATENT_SIDE, LATENT_SIDE)
        ) * scale
        noise, timesteps = torch.randn_like(sampled), torch.randint(len(alphas), (settings.batch,))
        noisy = noise_scheduler.add_noise(sampled, noise, timesteps).to(memory_format=torch.channels_last)
        captioned = torch.rand(settings.batch) >= settings.caption_dropout
        prompt_embeds = networks["text_encoder"](tokens[torch.where(captioned, index, len(captions))])[0]
        predicted = networks["unet"](noisy, timesteps, encoder_hidden_states=prompt_embeds).sample
        signal_to_noise = alphas[timesteps] / (1 - alphas[timesteps])
        weight = signal_to_noise.clamp(max=settings.min_snr_gamma) / signal_to_noise
        trainer.update((weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean())
    networks.load_state_dict(trainer.average)
    return make_pipeline(autoencoder, networks["text_encoder"].eval(), tokenizer, networks["unet"].eval())


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (B, 24) int64, padded and cut to length."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
