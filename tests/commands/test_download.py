"""`distill-sd download` against a web server on the loopback, through img2dataset itself."""

import io
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from PIL import Image
from support.stages import tree
from support.web import IMG2DATASET, Server, encoded_image, serving, write_list

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


# What the server answers with; "inward" comes from one that redirects to it.
KINDS = [
    *["good"] * 6,
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
    *["inward"] * 2,
]


@pytest.fixture(scope="module")
def downloaded(server, tmp_path_factory):
    """A list with all kinds and a file of this machine, downloaded; the command's options, its output, and the tars."""
    place = tmp_path_factory.mktemp("download")
    (place / "secret.jpg").write_bytes(encoded_image(1))

    class Redirecting(Server):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", f"{server}/good/1.jpg")
            self.send_header("Content-Length", "0")
            self.end_headers()

    with serving(Redirecting) as other:
        rows = [
            (f"{other if kind == 'inward' else server}/{kind}/{number}.jpg", f"{kind} {number}")
            for number, kind in enumerate(KINDS)
        ]
        urls = write_list(place / "list.parquet", [*rows, (f"file://{place}/secret.jpg", "file")])
        options = ("--urls", urls, "--out", place / "tars", "--entries-per-tar", 10, "--timeout", 4, "--retries", 0)
        result = download(*options)
        assert result.exit_code == 0, result.output
        yield options, result.output, place / "tars"


def captions_in(tars):
    return {record.caption for record in open_source(DataSettings(data=str(tars))).records}


@needs_program
def test_available_images_are_downloaded_and_failures_are_counted_by_cause(downloaded):
    options, output, out = downloaded
    source = open_source(DataSettings(data=str(out)))
    captions = captions_in(out)
    assert {f"good {number}" for number in range(6)} | {"moved 6"} <= captions
    assert not any(
        caption.split()[0] in ("missing", "broken", "loop", "html", "empty", "refused") for caption in captions
    )
    for record in source.records:
        assert min(Image.open(io.BytesIO(source.read(record))).size) == 512
    assert f"holds {len(captions)} images from {len(KINDS)} URLs, in 2 tars" in output
    assert "2 x HTTP Error 404: Not Found" in output
    assert "1 x HTTP Error 500" in output
    counted = sum(int(line.split(" x ")[0]) for line in output.splitlines() if " x " in line)
    assert counted == len(KINDS) - len(captions)


@needs_program
def test_a_redirect_to_another_server_of_this_machine_is_not_followed(downloaded):
    """Nor are files read, whatever the list says."""
    _, output, out = downloaded
    assert "note: 1 URLs are left out: neither http nor https" in output
    assert "2 x <urlopen error redirected to a private address>" in output
    assert not any(caption.split()[0] in ("inward", "file") for caption in captions_in(out))
    assert "did not load the rules" not in output


@needs_program
def test_a_download_is_resumed_and_a_finished_one_left_alone(downloaded):
    options, _, out = downloaded
    captions, before, requests = captions_in(out), tree(out), len(Server.hits)
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
    assert captions_in(out) == captions
    assert (out / "note.txt").read_text() == "a user's file"

    other = download(*options, "--seed", 1)
    assert other.exit_code == 2
    assert "was created with other settings (seed 0, now 1). Choose another --out." in other.output


def test_it_is_an_error_with_the_causes_if_all_downloads_fail(tmp_path):
    """With a program that leaves what img2dataset does: an empty tar and its counts."""
    urls = write_list(tmp_path / "list.parquet", [(f"http://127.0.0.1/{i}.jpg", "x") for i in range(3)])
    counts = {"count": 3, "successes": 0, "status_dict": {"HTTP Error 404: Not Found": 3}}
    stand_in = tmp_path / "img2dataset"
    stand_in.write_text(f"""#!/bin/sh
cd {tmp_path}/tars && tar cf 00000.tar -T /dev/null && echo '{json.dumps(counts)}' > 00000_stats.json
""")
    stand_in.chmod(0o755)
    options = ["--out", tmp_path / "tars", "--caption-column", "generated_caption", "--img2dataset", stand_in]
    result = CliRunner().invoke(main, ["download", "--urls", *map(str, [urls, *options])])
    assert result.exit_code == 2
    assert "holds 0 images from 3 URLs" in result.output
    assert "3 x HTTP Error 404" in result.output
    assert "All downloads failed." in result.output


def test_urls_that_are_not_of_the_web_are_left_out(tmp_path):
    bad = {
        "file:///etc/hostname": "neither http nor https",
        "ftp://example.com/a.jpg": "neither http nor https",
        "data:image/png;base64,AAAA": "neither http nor https",
        "/etc/hostname": "neither http nor https",
        "http:///a.jpg": "no server",
        "http://[::1/a.jpg": "not a URL",
        "http://169.254.169.254/latest/meta-data": "a link-local address",
        "http://2852039166/": "a link-local address",
        "http://0xa9fea9fe/": "a link-local address",
        "http://[fe80::1%25eth0]/": "a link-local address",
        "http://[::ffff:169.254.169.254]/": "a link-local address",
        None: "not text",
    }
    good = ["http://example.com/a.jpg", "HTTPS://example.com/b.jpg", "http://127.0.0.1/c.jpg"]
    urls = write_list(tmp_path / "list.parquet", [(url, "x") for url in [*bad, *good]])
    options = ["--out", tmp_path / "tars", "--caption-column", "generated_caption", "--img2dataset", "true"]
    result = CliRunner().invoke(main, ["download", "--urls", *map(str, [urls, *options])])
    for reason, count in Counter(bad.values()).items():
        assert f"note: {count} URLs are left out: {reason}" in result.output
    kept = pyarrow.parquet.read_table(tmp_path / "tars" / "list" / "urls.parquet").column("url").to_pylist()
    assert sorted(kept) == sorted(good)
    # `true` is not Python, and so it cannot load the rules.
    assert "warning: " in result.output
    assert "did not load the rules" in result.output
    urls = write_list(tmp_path / "bad.parquet", [(url, "x") for url in bad])
    options[1] = tmp_path / "other"
    result = CliRunner().invoke(main, ["download", "--urls", *map(str, [urls, *options])])
    assert (result.exit_code, "lists no URLs that can be downloaded" in result.output) == (2, True)


def test_failures_are_grouped_by_kind_and_printed_safely(tmp_path):
    causes = {
        **{f"HTTP Error 404: gone \x1b[2J {i}": 1 for i in range(30)},
        **{f"<urlopen error [SSL] certificate is not valid for 'host{i}.example'>": 1 for i in range(20)},
        **{f"IncompleteRead({i} bytes read, {i * 7} more expected)": 1 for i in range(10)},
        "<urlopen error [Errno -2] Name or service not known>": 5,
        "<urlopen error [Errno 111] Connection refused>": 4,
        **{f"cause {'abcdefghijklmnopqrst'[i]}\x07": 1 for i in range(20)},
        "success": 1,
    }
    stats = {"count": 90, "successes": 1, "status_dict": causes}
    (tmp_path / "00000_stats.json").write_text(json.dumps(stats))
    lines = summary(tmp_path, tally(tmp_path), 1).splitlines()[1:]
    assert lines[:6] == [
        "  30 x HTTP Error 404: Not Found",
        "  20 x <urlopen error [SSL] certificate is not valid for ...>",
        "  10 x IncompleteRead(N bytes read, N more expected)",
        "  5 x <urlopen error [Errno -2] Name or service not known>",
        "  4 x <urlopen error [Errno 111] Connection refused>",
        "  1 x cause a\\x07",
    ]
    assert (len(lines), lines[-1]) == (13, "  13 x other causes")


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
