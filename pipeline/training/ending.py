"""What follows a training: report, fp16 files, a line for the user, and the upload. None of it costs the result."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.models.hub import upload
from pipeline.models.save import write_fp16_variant
from pipeline.settings.training import TrainingSettings
from pipeline.system.echo import say
from pipeline.system.errors import UserError, attempt_all, failing_with
from pipeline.system.page import REPORT


def finish(
    settings: TrainingSettings,
    what: str,
    held: str,
    save_report: Callable[[], None],
    before_upload: Callable[[], None],
    problems: list[str],
    note: str | None = None,
) -> None:
    """Finish a training of a `what`, "student"; `held` is what --out holds now, as the user is told it, with a `note`.

    Raises UserError, at the end, for `problems` and for each part that fails.
    """

    def report() -> None:
        if settings.report:
            with failing_with(
                f"{settings.out} holds the finished {what}, but its report could not be written",
                "Rerun the same command to write it, or add --no-report.",
            ):
                save_report()

    def halve() -> None:
        if settings.fp16_variant:
            write_fp16_variant(settings.out, settings.out)

    def tell() -> None:
        seen = f"; see {settings.out / REPORT}" if (settings.out / REPORT).is_file() else ""
        say(f"{settings.out} holds {held}{seen}")
        if note:
            say(note)

    def publish() -> None:
        if settings.push_to_hub:
            before_upload()
            say(f"uploaded to {upload(settings.out, settings.push_to_hub)}")

    def tell_problems() -> None:
        if problems:
            raise UserError("\n".join(problems))

    attempt_all(report, halve, tell, publish, tell_problems)
