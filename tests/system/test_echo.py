"""Text from captions and file names cannot control the terminal."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.system.echo import one_line, printable, say

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb\x07", r"a\x1b[2Jb\x07"),
        ("title\x9d0;x\x9c", r"title\x9d0;x\x9c"),
        ("gnp.\u202eexe", r"gnp.\u202eexe"),
        ("lone \ud800", r"lone \ud800"),
        ("line\rover", r"line\rover"),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert printable(text) == shown


def test_ordinary_text_stays_as_it_is():
    text = "two lines\n\tand a tab: Zürich, 東京, 👩\u200d🚀, 'quotes' and \\backslash"
    assert printable(text) == text


def test_a_name_stays_within_its_line():
    assert one_line("a\nb\tc\x1b.png") == r"a\nb\tc\x1b.png"


def test_say_prints_the_escapes(capsys):
    say("caption: \x1b[31mred")
    assert capsys.readouterr().out == "caption: \\x1b[31mred\n"


def printing(target: str) -> subprocess.CompletedProcess:
    """A process that prints twice and goes on, with its output sent to `target` by a shell."""
    script = "from pipeline.system.echo import say; say('one'); say('two'); say('went on', err=True)"
    command = f'"{sys.executable}" -c "{script}" {target}'
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)


def test_the_work_goes_on_when_nobody_reads():
    result = printing("> >(true); sleep 0.1")
    assert (result.returncode, result.stderr) == (0, "went on\n")


def test_output_that_cannot_be_written_is_named():
    assert "what is printed cannot be written (No space left on device)" in printing("> /dev/full").stderr
