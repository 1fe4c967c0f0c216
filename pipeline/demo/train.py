"""Trains the demo teacher: autoencoder first, then text encoder and U-Net together on its latents.

    scenes -> autoencoder -> latents -> text encoder + U-Net (averaged weights) -> diffusers pipeline

Everything on the way lies in the work folder. Running the same command again goes on from there.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from pipeline.demo.networks import (
    LATENT_SIDE,
    make_autoencoder,
    make_noise_scheduler,
    make_pipeline,
    make_text_encoder,
    make_tokenizer,
    make_unet,
)
from pipeline.demo.scenes import SIDE, make_scene, parse_caption
from pipeline.demo.text import Reader, answers_of, reading_loss
from pipeline.demo.trainer import TeacherSettings, Trainer
from pipeline.models.bundled import CHECKSUMS
from pipeline.system.errors import UserError
from shards.files import atomic_file, file_sha256, write_json

SETTINGS = "settings.json"
# Settings that may change from one run of the command to the next in one work folder. More steps train on.
FREE = {"out", "work", "steps", "checkpoint_every", "evaluate"}
# Background, layout and relations are decided at high noise, where the error in the predicted noise is so small that
# captions hardly count in it. So the loss is divided by a power of alpha_bar, and the uniform draw of the timestep is
# raised to a power below 1, which makes high ones more frequent.
LOSS_POWER, DRAW_POWER = 0.75, 2 / 3
GUIDANCES = (3.0, 5.0)


def _claim(settings: TeacherSettings) -> None:
    """Keeps one work folder to one set of settings. Raises UserError with what differs."""
    settings.work.mkdir(parents=True, exist_ok=True)
    file = settings.work / SETTINGS
    wanted = {key: value for key, value in settings.as_json().items() if key not in FREE}
    if not file.exists():
        write_json(file, wanted)
    found = json.loads(file.read_text(encoding="utf-8"))
    differing = [f"{key}: {found.get(key)} there, {wanted[key]} now" for key in wanted if found.get(key) != wanted[key]]
    if differing:
        raise UserError(f"{settings.work} was begun with other settings ({'; '.join(differing)}); take another --work")


def render_scenes(work: Path, settings: TeacherSettings) -> tuple[np.ndarray, list[str]]:
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


def train_autoencoder(work: Path, settings: TeacherSettings) -> nn.Module:
    """Pictures -> an autoencoder trained on absolute and squared error, with its latents held near N(0, 1)."""
    pictures, _ = render_scenes(work, settings)
    torch.manual_seed(settings.seed)
    autoencoder = make_autoencoder().to(memory_format=torch.channels_last)
    trainer = Trainer(
        autoencoder, work / "autoencoder.pt", settings.autoencoder_steps, settings.autoencoder_learning_rate, settings
    )
    for _ in trainer.remaining("autoencoder"):
        pixels = to_pixels(pictures[torch.randint(len(pictures), (settings.autoencoder_batch,)).numpy()])
        posterior = autoencoder.encode(pixels).latent_dist
        decoded = autoencoder.decode(posterior.sample()).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + settings.kl_weight * divergence
        trainer.update(loss)
    autoencoder.load_state_dict(trainer.average)
    return autoencoder.eval().requires_grad_(False)


def encode_latents(work: Path, autoencoder: nn.Module, settings: TeacherSettings) -> tuple[np.ndarray, float]:
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
        with atomic_file(file) as stream:
            np.save(stream, np.concatenate(encoded))
    latents = np.load(file)
    mean, deviation = latents[:4000, :4].astype(np.float32), latents[:4000, 4:].astype(np.float32)
    return latents, float(1 / np.sqrt(mean.var() + np.square(deviation).mean()))


def train_text_encoder(work: Path, settings: TeacherSettings) -> CLIPTextModel:
    """Captions -> a text encoder from whose states one attention layer reads all that they say."""
    _, captions = render_scenes(work, settings)
    tokenizer = make_tokenizer()
    tokens = tokenize(tokenizer, captions)
    answers = torch.stack([answers_of(parse_caption(caption)) for caption in captions])
    torch.manual_seed(settings.seed)
    networks = nn.ModuleDict({"text_encoder": make_text_encoder(tokenizer), "reader": Reader()})
    trainer = Trainer(networks, work / "text_encoder.pt", settings.text_steps, settings.text_learning_rate, settings)
    for _ in trainer.remaining("text encoder"):
        index = torch.randint(len(captions), (settings.text_batch,))
        trainer.update(reading_loss(networks["reader"](networks["text_encoder"](tokens[index])[0]), answers[index]))
    networks.load_state_dict(trainer.average)
    return networks["text_encoder"].eval().requires_grad_(False)


def train_diffusion(work: Path, settings: TeacherSettings) -> StableDiffusionPipeline:
    """The U-Net, on the latents of a trained autoencoder and the states of a trained text encoder, both frozen.

    Noise prediction with Min-SNR weights (Hang et al. 2023) and more weight on high noise; some captions are left
    empty, for classifier-free guidance. Returns the pipeline with averaged weights.
    """
    autoencoder, unet = begin_with(settings)
    autoencoder = autoencoder or train_autoencoder(work, settings)
    text_encoder = train_text_encoder(work, settings)
    latents, scale = encode_latents(work, autoencoder, settings)
    autoencoder.register_to_config(scaling_factor=scale)
    _, captions = render_scenes(work, settings)
    tokenizer, noise_scheduler = make_tokenizer(), make_noise_scheduler()
    tokens = tokenize(tokenizer, [*captions, ""])
    torch.manual_seed(settings.seed)
    unet = (unet or make_unet()).to(memory_format=torch.channels_last).train()
    alphas = noise_scheduler.alphas_cumprod
    trainer = Trainer(unet, work / "unet.pt", settings.steps, settings.learning_rate, settings)
    for _ in trainer.remaining("U-Net"):
        index = torch.randint(len(captions), (settings.batch,))
        posterior = torch.from_numpy(latents[index.numpy()]).float()
        sampled = (
            posterior[:, :4] + posterior[:, 4:] * torch.randn(settings.batch, 4, LATENT_SIDE, LATENT_SIDE)
        ) * scale
        noise = torch.randn_like(sampled)
        timesteps = (torch.rand(settings.batch) ** DRAW_POWER * len(alphas)).long().clamp(max=len(alphas) - 1)
        noisy = noise_scheduler.add_noise(sampled, noise, timesteps).to(memory_format=torch.channels_last)
        captioned = torch.rand(settings.batch) >= settings.caption_dropout
        with torch.no_grad():
            prompt_embeds = text_encoder(tokens[torch.where(captioned, index, len(captions))])[0]
        predicted = unet(noisy, timesteps, encoder_hidden_states=prompt_embeds).sample
        signal_to_noise = alphas[timesteps] / (1 - alphas[timesteps])
        weight = signal_to_noise.clamp(max=settings.min_snr_gamma) / signal_to_noise
        weight = weight / alphas[timesteps] ** LOSS_POWER
        trainer.update((weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean())
    unet.load_state_dict(trainer.average)
    return make_pipeline(autoencoder, text_encoder, tokenizer, unet.eval())


def begin_with(settings: TeacherSettings) -> tuple[nn.Module | None, nn.Module | None]:
    """The autoencoder and the U-Net of the pipeline to begin with, float32; None and None without one.

    Raises UserError if it cannot be loaded or is of another architecture.
    """
    if settings.init_from is None:
        return None, None
    autoencoder, unet = make_autoencoder(), make_unet()
    try:
        begun = StableDiffusionPipeline.from_pretrained(settings.init_from, local_files_only=True)
        autoencoder.load_state_dict(begun.vae.state_dict())
        unet.load_state_dict(begun.unet.state_dict())
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--init-from {settings.init_from} is no demo teacher to begin with: {reason}") from None
    return autoencoder.to(memory_format=torch.channels_last).eval().requires_grad_(False), unet


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (B, 24) int64, padded and cut to length."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def export(teacher: StableDiffusionPipeline, out: Path) -> None:
    """Writes the pipeline in half precision in diffusers layout, with the checksums of its weights.

    The checksums are taken away first and written last, so that a folder that has them is whole. The
    pipeline that is passed keeps its dtype, with its weights rounded to what was written.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / CHECKSUMS).unlink(missing_ok=True)
    dtype = teacher.dtype
    teacher.to(torch.float16).save_pretrained(out)
    teacher.to(dtype)
    weights = sorted(out.rglob("*.safetensors"))
    write_json(out / CHECKSUMS, {file.relative_to(out).as_posix(): file_sha256(file) for file in weights})
