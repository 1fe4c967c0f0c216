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
from pipeline.commands.download import summary, tally
from pipeline.data.source import DataSettings, open_source

needs_program = pytest.mark.skipif(IMG2DATASET is None, reason="img2dataset is not installed; `make test` installs it")


@pytest.fixture(scope="module")
def server():
    with serving() as address:
        yield address


def download(*arguments):
    options = [
        "download",
        *map(str, arguments),
        "--caption-column",
        "generated_caption",
        "--processes",
        "1",
        "--threads",
        "8",
    ]
    return CliRunner().invoke(main, options + (["--img2dataset", IMG2DATASET] if IMG2DATASET else []))


@needs_program
def test_available_images_are_downloaded_and_failures_are_counted_by_cause(server, tmp_path):
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
    options = ("--urls", urls, "--out", out, "--entries-per-tar", 9, "--timeout", 4, "--retries", 0)
    result = download(*options)
    assert result.exit_code == 0, result.output
    source = open_source(DataSettings(data=str(out)))
    captions = {record.caption for record in source.records}
    assert {f"good {number}" for number in range(6)} | {"moved 6"} <= captions
    assert not any(
        caption.split()[0] in ("missing", "broken", "loop", "html", "empty", "refused") for caption in captions
    )
    for record in source.records:
        assert min(Image.open(io.BytesIO(source.read(record))).size) == 512
    assert f"holds {len(captions)} images from {len(kinds)} URLs, in 2 tars" in result.output
    assert "2 x HTTP Error 404: Not Found" in result.output
    assert "1 x HTTP Error 500" in result.output
    assert sum(int(line.split(" x ")[0]) for line in result.output.splitlines() if " x " in line) == 17 - len(captions)

    before, requests = tree(out), len(Server.hits)
    rerun = download(*options)
    assert rerun.exit_code == 0, rerun.output
    assert tree(out) == before
    assert len(Server.hits) == requests

    # A killed run leaves a tar without its counts.
    (out / "00001.tar").write_bytes(before["00001.tar"][:3000])
    (out / "00001_stats.json").unlink()
    (out / "note.txt").write_text("a user's file")
    assert download(*options).exit_code == 0
    assert (out / "00000.tar").read_bytes() == before["00000.tar"]
    assert {record.caption for record in open_source(DataSettings(data=str(out))).records} == captions
    assert (out / "note.txt").read_text() == "a user's file"

    other = download(*options, "--seed", 1)
    assert other.exit_code == 2
    assert "was created with other settings (seed 0, now 1). Choose another --out." in other.output


@needs_program
def test_it_is_an_error_with_the_causes_if_all_downloads_fail(server, tmp_path):
    urls = write_list(tmp_path / "list.parquet", [(f"{server}/missing/{i}.jpg", "x") for i in range(3)])
    result = download("--urls", urls, "--out", tmp_path / "tars", "--retries", 0)
    assert result.exit_code == 2
    assert "holds 0 images from 3 URLs" in result.output
    assert "3 x HTTP Error 404" in result.output
    assert "All downloads failed." in result.output


def test_a_list_that_cannot_be_used(tmp_path):
    """The list is checked before any download, so any program will do."""
    options = ("--out", tmp_path / "tars", "--img2dataset", "true")
    good = write_list(tmp_path / "good.parquet", [("http://127.0.0.1/a.jpg", "x")])
    (tmp_path / "text.parquet").write_text("http://127.0.0.1/a.jpg")
    empty = write_list(tmp_path / "empty.parquet", [])
    for urls, more, message in (
        (tmp_path / "none.parquet", (), "none.parquet is not a file"),
        (tmp_path / "text.parquet", (), "text.parquet is not a parquet file"),
        (empty, (), "lists no URLs"),
        (
            good,
            ("--url-column", "URL"),
            "has no column 'URL'. It has 'url', 'generated_caption': choose one with --url-column.",
        ),
    ):
        result = CliRunner().invoke(
            main, ["download", "--urls", str(urls), *map(str, options), "--caption-column", "generated_caption", *more]
        )
        assert result.exit_code == 2, result.output
        assert message in result.output
    assert not (tmp_path / "tars").exists()


def test_tars_from_elsewhere_are_left_untouched(tmp_path):
    urls = write_list(tmp_path / "list.parquet", [("http://127.0.0.1/a.jpg", "x")])
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "00000.tar").write_bytes(b"a user's file")
    arguments = ["download", "--urls", str(urls), "--out", str(tmp_path / "tars"), "--img2dataset", "true"]
    result = CliRunner().invoke(main, [*arguments, "--caption-column", "generated_caption"])
    assert (result.exit_code, "contains tars that this command did not create" in result.output) == (2, True)
    assert [path.name for path in (tmp_path / "tars").iterdir()] == ["00000.tar"]


def test_the_seed_decides_the_order_and_the_selection(tmp_path):
    rows = [(f"http://127.0.0.1/{number:02d}.jpg", str(number)) for number in range(40)]
    urls = write_list(tmp_path / "list.parquet", rows)

    def listed(name, *more):
        out = tmp_path / name
        arguments = ["download", "--urls", str(urls), "--out", str(out), "--caption-column", "generated_caption", *more]
        # `true` downloads nothing, so the tars are missing.
        assert "tars are not finished" in CliRunner().invoke(main, [*arguments, "--img2dataset", "true"]).output
        return pyarrow.parquet.read_table(out / "list" / "urls.parquet").to_pylist()

    first = listed("a")
    assert sorted(row["url"] for row in first) == [url for url, _ in rows]
    assert all(row["caption"] == str(int(Path(row["url"]).stem)) for row in first)
    assert first == listed("b")
    assert first != sorted(first, key=lambda row: row["url"])
    assert first != listed("c", "--seed", "1")
    assert listed("d", "--max-samples", "5") == first[:5]


def test_a_program_that_fails_or_does_not_exist(tmp_path):
    urls = write_list(tmp_path / "list.parquet", [("http://127.0.0.1/a.jpg", "x")])
    arguments = [
        "download",
        "--urls",
        str(urls),
        "--out",
        str(tmp_path / "tars"),
        "--caption-column",
        "generated_caption",
    ]
    failed = CliRunner().invoke(main, [*arguments, "--img2dataset", "false"])
    assert (failed.exit_code, "ended with status 1" in failed.output) == (2, True)
    missing = CliRunner().invoke(main, [*arguments, "--img2dataset", "no-such-program"])
    assert (missing.exit_code, "pipx install" in missing.output) == (2, True)


def test_counts_are_summed_over_the_tars(tmp_path):
    for number, causes in enumerate(({"success": 2, "HTTP Error 404: Not Found": 1}, {"success": 1, "timed out": 2})):
        stats = {"count": 3, "successes": causes["success"], "status_dict": causes}
        (tmp_path / f"{number:05d}_stats.json").write_text(json.dumps(stats))
    assert summary(tmp_path, tally(tmp_path), 2).splitlines()[1:] == [
        "  2 x timed out",
        "  1 x HTTP Error 404: Not Found",
    ]
