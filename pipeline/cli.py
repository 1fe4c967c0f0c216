"""`distill-sd`: the stages under one name."""

from __future__ import annotations

import importlib

import click

COMMANDS = {
    "plan": ("pipeline.commands.plan", "What a cache will take, and what fits a budget."),
    "download": ("pipeline.commands.download", "A list of addresses and captions to tars, through img2dataset."),
    "encode": ("pipeline.encode", "Images and captions to latents and prompt embeddings."),
    "teacher-cache": ("pipeline.teacher_cache", "Latents to the teacher's predictions and features."),
    "distill": ("pipeline.distill", "Train a student from a cache."),
    "finetune": ("pipeline.commands.finetune", "Train a pipeline's U-Net on latents, whole or with LoRA."),
    "sample": ("pipeline.commands.sample", "Pictures from a model, a teacher or a student."),
    "evaluate": ("pipeline.commands.evaluate", "A student beside its teacher: cost, fidelity, quality."),
    "export": ("pipeline.commands.export", "A model as a single file, as ONNX, or with int8 weights."),
    "verify": ("pipeline.commands.verify", "Check latents or a cache for damage."),
    "inspect": ("pipeline.commands.inspect", "Show what latents or a cache hold."),
    "demo-scenes": ("pipeline.commands.demo_scenes", "Captioned pictures of shapes, to try the stages on."),
    "demo-teacher": ("pipeline.commands.demo_teacher", "Train the bundled demo teacher once more."),
}


class LazyGroup(click.Group):
    """Imports a stage only when it is asked for: `distill-sd --help` needs no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return importlib.import_module(COMMANDS[name][0]).command if name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, help) in COMMANDS.items()])


@click.command(cls=LazyGroup)
@click.version_option(package_name="distill-sd")
def main() -> None:
    """Distil Stable Diffusion U-Nets into small, fast students, offline.

    The three stages, in order: encode, teacher-cache, distill. Each resumes where it stopped when the
    same command is run again.
    """


if __name__ == "__main__":
    main()
