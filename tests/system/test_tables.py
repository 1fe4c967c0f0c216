"""Markdown tables: padded columns, and cells that cannot break the table."""

import pytest

from pipeline.system.tables import markdown_table


def test_columns_are_padded_and_numbers_are_aligned_to_the_right():
    assert markdown_table(("name", "n"), [("a", "1"), ("longest", "1,000")], numbers={1}) == "\n".join(
        [
            "| name    |     n |",
            "| ------- | ----: |",
            "| a       |     1 |",
            "| longest | 1,000 |",
        ]
    )


def test_a_table_without_rows_has_a_head():
    assert markdown_table(("", "value"), []) == "|     | value |\n| --- | ----- |"


def test_a_cell_cannot_break_the_table():
    table = markdown_table(("name",), [("a|b\nc",)])
    assert table.splitlines()[2] == r"| a\|b c |"


def test_rows_of_another_length_than_the_head_are_refused():
    with pytest.raises(ValueError, match="zip"):
        markdown_table(("name", "value"), [("a",)])
