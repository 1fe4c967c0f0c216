"""`distill-sd`: all commands under one name."""

from __future__ import annotations

import difflib
import gc
import importlib
import sys

import click

from pipeline.system.command import INTERRUPTED_STATUS

COMMANDS = {
    "plan": ("pipeline.commands.plan", "Estimate what a cache will cost and what fits a budget."),
    "download": (
        "pipeline.commands.download",
        "Download a list of image URLs and captions into tars with img2dataset.",
    ),
    "encode": ("pipeline.encode", "Encode images and captions into latents and prompt embeddings."),
    "teacher-cache": ("pipeline.teacher_cache", "Run the teacher on latents and store its predictions and features."),
    "distill": ("pipeline.distill", "Train a student from a cache."),
    "finetune": ("pipeline.commands.finetune", "Train a pipeline's U-Net on latents, in full or with LoRA."),
    "sample": ("pipeline.commands.sample", "Generate images with any model, teacher or student."),
    "evaluate": ("pipeline.commands.evaluate", "Compare a student with its teacher: cost, fidelity, quality."),
    "export": ("pipeline.commands.export", "Export a model as a single file, as ONNX, or with int8 weights."),
    "verify": ("pipeline.commands.verify", "Check latents or a cache for damage."),
    "inspect": ("pipeline.commands.inspect_shards", "Show the contents of latents or a cache."),
    "demo-scenes": ("pipeline.commands.demo_scenes", "Write captioned images of shapes, to try the stages on."),
    "demo-teacher": ("pipeline.commands.demo_teacher", "Retrain the bundled demo teacher."),
}


class LazyGroup(click.Group):
    """Imports a command only when it is needed, so that `distill-sd --help` does not import torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = COMMANDS[name][0]
        imported = module in sys.modules
        # Collections would look through all that the libraries make, and all of it stays.
        gc.disable()
        try:
            return importlib.import_module(module).command
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            sys.exit(INTERRUPTED_STATUS)
        finally:
            if not imported:
                gc.freeze()
            gc.enable()

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        close = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if args[0] not in COMMANDS and close:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {close[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, help) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="distill-sd")
def main() -> None:
    """Distil Stable Diffusion U-Nets into small, fast students, offline.

    The three stages, in order: encode, teacher-cache, distill. Rerun the same command to resume a stage
    where it stopped.
    """


if __name__ == "__main__":
    main()
