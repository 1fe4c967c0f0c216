"""Text from captions and file names cannot control the terminal."""

import pytest

from pipeline.system.echo import printable, say


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


def test_say_prints_the_escapes(capsys):
    say("caption: \x1b[31mred")
    assert capsys.readouterr().out == "caption: \\x1b[31mred\n"
