"""Train the demo teacher: first the autoencoder and the text encoder, then the U-Net on their latents and states.

    scenes -> autoencoder -> latents -> U-Net with the text encoder's states (averaged weights) -> diffusers pipeline

All intermediate results are in the work folder. Rerun the same command to resume from them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import nn
from tqdm import tqdm

from pipeline.demo.networks import LATENT_SIDE, make_autoencoder, make_noise_scheduler, make_tokenizer
from pipeline.demo.scenes import SIDE, make_scene, parse_caption
from pipeline.demo.teachers import DemoTeacher
from pipeline.demo.text import Reader, answers_of, reading_loss
from pipeline.demo.trainer import Trainer
from pipeline.models.bundled import BUNDLED
from pipeline.models.checksums import CHECKSUMS, write_checksums
from pipeline.models.families import Frame, denoise, family_of_pipeline
from pipeline.models.families.family import Conditioning
from pipeline.models.families.sd import PROMPT_EMBEDS
from pipeline.models.save import save_pipeline
from pipeline.settings.demo_teacher import DemoTeacherSettings
from pipeline.system.errors import UserError, first_line
from pipeline.system.json_files import read_json
from shards.files import atomic_file, write_json

SETTINGS = "settings.json"
# Settings that may change between runs in the same work folder. With more `steps`, training continues.
MAY_CHANGE = {"out", "work", "steps", "checkpoint_every", "evaluate"}
# Background, layout and relations are decided at high noise, where the error of the predicted noise is so small that
# captions hardly affect it. So the loss is divided by a power of alpha_bar, and the uniform draw of the timestep is
# raised to a power below 1, which makes high timesteps more frequent.
LOSS_POWER, DRAW_POWER = 0.75, 2 / 3
GUIDANCES = (3.0, 5.0)
IMITATION_WEIGHT = 10.0


def claim_work_folder(settings: DemoTeacherSettings) -> None:
    """Create the work folder and record its settings there. Raises UserError if it was created with other settings."""
    settings.work.mkdir(parents=True, exist_ok=True)
    file = settings.work / SETTINGS
    current = {key: value for key, value in settings.as_json().items() if key not in MAY_CHANGE}
    if not file.exists():
        write_json(file, current)
    recorded = read_json(file, "Restore it from a backup, or use another --work.")
    changes = [f"{key} {recorded.get(key)}, now {now}" for key, now in current.items() if recorded.get(key) != now]
    if changes:
        raise UserError(f"{settings.work} was created with other settings ({'; '.join(changes)}). Use another --work.")


def render_scenes(work: Path, settings: DemoTeacherSettings) -> tuple[np.ndarray, list[str]]:
    """The training scenes: images, uint8 (N, 64, 64, 3), memory-mapped from a file, and their captions."""
    images_file, captions_file = work / "pictures.npy", work / "captions.json"
    if not captions_file.exists():
        shape = (settings.scenes, SIDE, SIDE, 3)
        images = np.lib.format.open_memmap(images_file, mode="w+", dtype=np.uint8, shape=shape)
        captions = []
        for index in tqdm(range(settings.scenes), desc="scenes", unit="image"):
            scene = make_scene(settings.seed, index)
            images[index] = scene.image
            captions.append(scene.caption)
        images.flush()
        captions_file.write_text(json.dumps(captions), encoding="utf-8")
    return np.load(images_file, mmap_mode="r"), json.loads(captions_file.read_text(encoding="utf-8"))


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], channels last in memory."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def train_autoencoder(work: Path, settings: DemoTeacherSettings) -> AutoencoderKL:
    """Train an autoencoder on the images, by absolute and squared error, with its latents kept near N(0, 1)."""
    images, _ = render_scenes(work, settings)
    torch.manual_seed(settings.seed)
    autoencoder = make_autoencoder().to(memory_format=torch.channels_last)
    trainer = Trainer(
        autoencoder, work / "autoencoder.pt", settings.autoencoder_steps, settings.autoencoder_learning_rate, settings
    )
    for _ in trainer.remaining("autoencoder"):
        pixels = to_pixels(images[torch.randint(len(images), (settings.autoencoder_batch,)).numpy()])
        posterior = autoencoder.encode(pixels).latent_dist
        decoded = autoencoder.decode(posterior.sample()).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + settings.kl_weight * divergence
        trainer.update(loss)
    autoencoder.load_state_dict(trainer.average)
    return autoencoder.eval().requires_grad_(False)


def encode_latents(work: Path, autoencoder: AutoencoderKL, settings: DemoTeacherSettings) -> tuple[np.ndarray, float]:
    """Mean and standard deviation of every image's posterior, float16 (N, 8, 16, 16), and the latents' scale.

    The scale gives sampled latents unit variance and becomes the autoencoder's `scaling_factor`.
    """
    images, _ = render_scenes(work, settings)
    file = work / "latents.npy"
    if not file.exists():
        encoded = []
        with torch.inference_mode():
            for start in tqdm(range(0, len(images), 64), desc="latents", unit="batch", mininterval=5):
                posterior = autoencoder.encode(to_pixels(images[start : start + 64])).latent_dist
                encoded.append(torch.cat((posterior.mean, posterior.std), dim=1).half().numpy())
        with atomic_file(file) as stream:
            np.save(stream, np.concatenate(encoded))
    latents = np.load(file)
    mean, deviation = latents[:4000, :4].astype(np.float32), latents[:4000, 4:].astype(np.float32)
    return latents, float(1 / np.sqrt(mean.var() + np.square(deviation).mean()))


def train_text_encoders(
    work: Path,
    teacher: DemoTeacher,
    settings: DemoTeacherSettings,
    pipeline: DiffusionPipeline,
    initial: DiffusionPipeline | None,
) -> None:
    """Train the text encoders of the pipeline until one attention layer can read all facts of a caption from each
    tensor that they give the U-Net. Of an `initial` teacher, whose U-Net is trained further, they learn the states."""
    _, captions = render_scenes(work, settings)
    answers = torch.stack([answers_of(parse_caption(caption)) for caption in captions])
    encoders = {part: getattr(pipeline, part) for part in teacher.family.encoders if part != "vae"}
    for part, encoder in encoders.items():
        if initial is not None and hasattr(initial, part):
            # The new one may have a layer more.
            encoder.load_state_dict(getattr(initial, part).state_dict(), strict=False)
    conditioning = teacher.family.encode_prompts(pipeline, [""])
    readers = nn.ModuleDict({name: Reader(given.shape[-1]) for name, given in conditioning.items()})
    networks = nn.ModuleDict({**encoders, "readers": readers})
    trainer = Trainer(networks, work / "text_encoder.pt", settings.text_steps, settings.text_learning_rate, settings)
    for _ in trainer.remaining("text encoder"):
        index = torch.randint(len(captions), (settings.text_batch,))
        chosen = [captions[i] for i in index.tolist()]
        conditioning = teacher.family.encode_prompts(pipeline, chosen)
        read = [reading_loss(readers[name](as_states(given)), answers[index]) for name, given in conditioning.items()]
        trainer.update(sum(read, imitation_loss(conditioning, chosen, initial)))
    networks.load_state_dict(trainer.average)
    networks.eval().requires_grad_(False)


def as_states(given: torch.Tensor) -> torch.Tensor:
    """Token states (B, T, D) as they are; a pooled embedding (B, D) as those of one token."""
    return given if given.ndim == 3 else given[:, None]


def imitation_loss(conditioning: Conditioning, captions: list[str], initial: DiffusionPipeline | None) -> torch.Tensor:
    """How far the first channels of the token states are from those of the initial teacher; 0 without one."""
    if initial is None:
        return torch.zeros(())
    with torch.no_grad():
        wanted = family_of_pipeline(initial).encode_prompts(initial, captions)[PROMPT_EMBEDS]
    return IMITATION_WEIGHT * F.mse_loss(conditioning[PROMPT_EMBEDS][..., : wanted.shape[-1]], wanted)


def train_diffusion(work: Path, teacher: DemoTeacher, settings: DemoTeacherSettings) -> DiffusionPipeline:
    """Train the U-Net on the latents and states of a trained autoencoder and text encoder, which are frozen.

    It learns noise prediction with Min-SNR weights (Hang et al. 2023) and more weight on high noise. Some captions are
    left empty for classifier-free guidance. Returns the pipeline with averaged weights.
    """
    initial = initial_teacher(settings)
    unet = initial_unet(teacher, initial, settings)
    autoencoder = train_autoencoder(work, settings) if initial is None else initial.vae
    torch.manual_seed(settings.seed)
    tokenizer = make_tokenizer()
    pipeline = teacher.make_pipeline(autoencoder, tokenizer)
    train_text_encoders(work, teacher, settings, pipeline, initial)
    latents, scale = encode_latents(work, autoencoder, settings)
    autoencoder.register_to_config(scaling_factor=scale)
    _, captions = render_scenes(work, settings)
    noise_scheduler = make_noise_scheduler()
    unet = unet.to(memory_format=torch.channels_last).train()
    alphas = noise_scheduler.alphas_cumprod
    framing = teacher.family.image_conditioning(Frame((SIDE, SIDE), (0, 0), (SIDE, SIDE)))
    framings = {name: given.expand(settings.batch, -1) for name, given in framing.items()}
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
        captioned = (torch.rand(settings.batch) >= settings.caption_dropout).tolist()
        chosen = [captions[i] if kept else "" for i, kept in zip(index.tolist(), captioned, strict=True)]
        with torch.no_grad():
            conditioning = teacher.family.encode_prompts(pipeline, chosen)
        predicted = denoise(unet, noisy, timesteps, {**conditioning, **framings}, teacher.family)
        signal_to_noise = alphas[timesteps] / (1 - alphas[timesteps])
        weight = settings.min_snr_gamma / signal_to_noise.clamp(min=settings.min_snr_gamma)
        weight = weight / alphas[timesteps] ** LOSS_POWER
        trainer.update((weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean())
    unet.load_state_dict(trainer.average)
    pipeline.register_modules(unet=unet.eval())
    return pipeline


def initial_teacher(settings: DemoTeacherSettings) -> DiffusionPipeline | None:
    """The `init_from` pipeline, in float32, or None without one. Raises UserError if it cannot be loaded, or has
    another autoencoder than demo teachers."""
    if settings.init_from is None:
        return None
    autoencoder = make_autoencoder()
    try:
        initial = DiffusionPipeline.from_pretrained(settings.init_from, local_files_only=True).to(torch.float32)
        autoencoder.load_state_dict(initial.vae.state_dict())
    except (OSError, ValueError, RuntimeError) as error:
        raise not_a_demo_teacher(settings, error) from None
    initial.register_modules(vae=autoencoder.to(memory_format=torch.channels_last).eval().requires_grad_(False))
    return initial


def initial_unet(
    teacher: DemoTeacher, initial: DiffusionPipeline | None, settings: DemoTeacherSettings
) -> UNet2DConditionModel:
    """The U-Net that training starts from: untrained, or with the weights of the initial teacher's."""
    torch.manual_seed(settings.seed)
    unet = teacher.make_unet()
    if initial is not None:
        try:
            teacher.take_over(unet, initial.unet.state_dict())
        except (KeyError, RuntimeError) as error:
            raise not_a_demo_teacher(settings, error) from None
    return unet


def not_a_demo_teacher(settings: DemoTeacherSettings, error: Exception) -> UserError:
    return UserError(f"--init-from {settings.init_from} is not a demo teacher: {first_line(error)}")


def is_exported(out: Path) -> bool:
    """Whether `out` is the bundled teacher, or holds what `export` wrote, whose checksums are of weights alone."""
    if out.resolve() in (folder.resolve() for folder in BUNDLED.values()):
        return True
    remedy = "Choose another --out."
    names = read_json(out / CHECKSUMS, remedy) if (out / CHECKSUMS).is_file() else {}
    return bool(names) and all(name.endswith(".safetensors") for name in names)


def export(teacher: DiffusionPipeline, out: Path) -> None:
    """Write the pipeline in half precision and diffusers layout, with the checksums of its weights.

    The checksums are deleted first and written last, so a folder that has them is complete. `teacher` keeps its
    dtype, but its weights are rounded to half precision.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / CHECKSUMS).unlink(missing_ok=True)
    dtype = teacher.dtype
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        teacher.to(torch.float16).save_pretrained(temporary)
        save_pipeline(Path(temporary), teacher.unet, out, dtype=torch.float16)
    teacher.to(dtype)
    write_checksums(out, "*.safetensors")
