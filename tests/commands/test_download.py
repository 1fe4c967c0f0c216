"""`distill-sd download` against a web server on the loopback, through img2dataset itself."""

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from PIL import Image
from support.stages import tree
from support.web import IMG2DATASET, Server, serving, write_list

from pipeline.cli import main
from pipeline.data.source import DataSettings, open_source

needs_program = pytest.mark.skipif(IMG2DATASET is None, reason="img2dataset is not here; `make test` installs it")


@pytest.fixture(scope="module")
def server():
    with serving() as address:
        yield address


def download(*arguments):
    words = [
        "download",
        *map(str, arguments),
        "--caption-column",
        "generated_caption",
        "--processes",
        "1",
        "--threads",
        "8",
    ]
    return CliRunner().invoke(main, words + (["--img2dataset", IMG2DATASET] if IMG2DATASET else []))


@needs_program
def test_what_can_be_had_comes_and_the_rest_is_counted_by_cause(server, tmp_path):
    kinds = ["good"] * 6 + [
        "moved",
        "animated",
        "missing",
        "missing",
        "broken",
        "loop",
        "html",
        "empty",
        "cut",
        "slow",
        "refused",
    ]
    rows = [(f"{server}/{kind}/{number}.jpg", f"{kind} {number}") for number, kind in enumerate(kinds)]
    urls, out = write_list(tmp_path / "list.parquet", rows), tmp_path / "tars"
    words = ("--urls", urls, "--out", out, "--entries-per-tar", 9, "--timeout", 4, "--retries", 0)
    result = download(*words)
    assert result.exit_code == 0, result.output
    source = open_source(DataSettings(data=str(out)))
    captions = {record.caption for record in source.records}
    assert {f"good {number}" for number in range(6)} | {"moved 6"} <= captions
    assert not any(
        caption.split()[0] in ("missing", "broken", "loop", "html", "empty", "refused") for caption in captions
    )
    for record in source.records:
        assert min(Image.open(io.BytesIO(source.read(record))).size) == 512
    assert f"holds {len(captions)} pictures of {len(kinds)} addresses, in 2 tars" in result.output
    assert "2 x HTTP Error 404: Not Found" in result.output
    assert "1 x HTTP Error 500" in result.output
    assert sum(int(line.split(" x ")[0]) for line in result.output.splitlines() if " x " in line) == 17 - len(captions)

    before, asked = tree(out), len(Server.hits)
    again = download(*words)
    assert again.exit_code == 0, again.output
    assert tree(out) == before
    assert len(Server.hits) == asked

    # A run that was killed leaves a tar without its count.
    (out / "00001.tar").write_bytes(before["00001.tar"][:3000])
    (out / "00001_stats.json").unlink()
    (out / "note.txt").write_text("mine")
    assert download(*words).exit_code == 0
    assert (out / "00000.tar").read_bytes() == before["00000.tar"]
    assert {record.caption for record in open_source(DataSettings(data=str(out))).records} == captions
    assert (out / "note.txt").read_text() == "mine"

    other = download(*words, "--seed", 1)
    assert other.exit_code == 2
    assert "was begun with other settings (seed 0, now 1): choose another --out" in other.output


@needs_program
def test_when_nothing_comes_that_is_an_error_with_the_causes(server, tmp_path):
    urls = write_list(tmp_path / "list.parquet", [(f"{server}/missing/{i}.jpg", "x") for i in range(3)])
    result = download("--urls", urls, "--out", tmp_path / "tars", "--retries", 0)
    assert result.exit_code == 2
    assert "holds 0 pictures of 3 addresses" in result.output
    assert "3 x HTTP Error 404" in result.output
    assert "nothing came" in result.output


def test_a_list_that_cannot_be_used(tmp_path):
    """Looked at before anything is downloaded, so any program will do."""
    words = ("--out", tmp_path / "tars", "--img2dataset", "true")
    good = write_list(tmp_path / "good.parquet", [("http://127.0.0.1/a.jpg", "x")])
    (tmp_path / "text.parquet").write_text("http://127.0.0.1/a.jpg")
    empty = write_list(tmp_path / "empty.parquet", [])
    for urls, more, message in (
        (tmp_path / "none.parquet", (), "none.parquet is no file"),
        (tmp_path / "text.parquet", (), "text.parquet is no parquet file"),
        (empty, (), "lists no addresses"),
        (
            good,
            ("--url-column", "URL"),
            "has no column 'URL'; it has 'url', 'generated_caption': choose one with --url-column",
        ),
    ):
        result = CliRunner().invoke(
            main, ["download", "--urls", str(urls), *map(str, words), "--caption-column", "generated_caption", *more]
        )
        assert result.exit_code == 2, result.output
        assert message in result.output
    assert not (tmp_path / "tars").exists()


def test_tars_from_elsewhere_are_left_alone(tmp_path):
    urls = write_list(tmp_path / "list.parquet", [("http://127.0.0.1/a.jpg", "x")])
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "00000.tar").write_bytes(b"mine")
    words = ["download", "--urls", str(urls), "--out", str(tmp_path / "tars"), "--img2dataset", "true"]
    result = CliRunner().invoke(main, [*words, "--caption-column", "generated_caption"])
    assert (result.exit_code, "of which this command knows nothing" in result.output) == (2, True)
    assert [path.name for path in (tmp_path / "tars").iterdir()] == ["00000.tar"]


def test_the_order_is_the_seeds_and_a_sample_is_drawn(tmp_path):
    rows = [(f"http://127.0.0.1/{number:02d}.jpg", str(number)) for number in range(40)]
    urls = write_list(tmp_path / "list.parquet", rows)

    def listed(name, *more):
        out = tmp_path / name
        words = ["download", "--urls", str(urls), "--out", str(out), "--caption-column", "generated_caption", *more]
        # `true` downloads nothing, so the tars are said to be lacking.
        assert "tars are not finished" in CliRunner().invoke(main, [*words, "--img2dataset", "true"]).output
        return pyarrow.parquet.read_table(out / "list" / "urls.parquet").to_pylist()

    first = listed("a")
    assert sorted(row["url"] for row in first) == [url for url, _ in rows]
    assert all(row["caption"] == str(int(Path(row["url"]).stem)) for row in first)
    assert first == listed("b")
    assert first != sorted(first, key=lambda row: row["url"])
    assert first != listed("c", "--seed", "1")
    assert listed("d", "--max-samples", "5") == first[:5]


def test_a_program_that_fails_or_is_not_there(tmp_path):
    urls = write_list(tmp_path / "list.parquet", [("http://127.0.0.1/a.jpg", "x")])
    words = ["download", "--urls", str(urls), "--out", str(tmp_path / "tars"), "--caption-column", "generated_caption"]
    failed = CliRunner().invoke(main, [*words, "--img2dataset", "false"])
    assert (failed.exit_code, "ended with status 1" in failed.output) == (2, True)
    lacking = CliRunner().invoke(main, [*words, "--img2dataset", "no-such-program"])
    assert (lacking.exit_code, "pipx install" in lacking.output) == (2, True)


def test_counts_are_summed_over_the_tars(tmp_path):
    from pipeline.commands.download import summary, tally

    for number, causes in enumerate(({"success": 2, "HTTP Error 404: Not Found": 1}, {"success": 1, "timed out": 2})):
        stats = {"count": 3, "successes": causes["success"], "status_dict": causes}
        (tmp_path / f"{number:05d}_stats.json").write_text(json.dumps(stats))
    assert summary(tmp_path, tally(tmp_path), 2).splitlines()[1:] == [
        "  2 x timed out",
        "  1 x HTTP Error 404: Not Found",
    ]
