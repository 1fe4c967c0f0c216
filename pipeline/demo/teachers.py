"""The demo's teachers by name: the family of each, and its networks, untrained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from pipeline.demo import networks, networks_xl
from pipeline.models.families import Family
from pipeline.models.families.sd import SD
from pipeline.models.families.sdxl import SDXL


@dataclass(frozen=True)
class DemoTeacher:
    """How a teacher's networks are made. The autoencoder, the tokenizer and the noise schedule are the same in all.

    `make_text_encoders` gives them by their names in the pipeline. `take_over` fills the U-Net with the weights of the
    teacher that training starts from: one of the same name, or for `demo-xl` also `demo`.
    """

    family: Family
    make_text_encoders: Callable[[CLIPTokenizer], dict[str, nn.Module]]
    make_unet: Callable[[], UNet2DConditionModel]
    take_over: Callable[[UNet2DConditionModel, Mapping[str, Tensor]], None]

    def make_pipeline(self, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer) -> DiffusionPipeline:
        """The pipeline of a trained autoencoder and untrained text encoders, without a U-Net."""
        return self.family.assemble(
            {},
            vae=autoencoder,
            **self.make_text_encoders(tokenizer),
            **dict.fromkeys(self.family.tokenizers, tokenizer),
            unet=None,
            scheduler=networks.make_noise_scheduler(),
        )


TEACHERS = {
    name: DemoTeacher(family, made.make_text_encoders, made.make_unet, made.take_over)
    for name, family, made in (("demo", SD, networks), ("demo-xl", SDXL, networks_xl))
}
