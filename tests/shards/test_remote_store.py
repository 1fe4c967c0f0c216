"""The store in a bucket: it keeps the promises of a directory, and its errors are never taken for damage."""

import os
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.buckets import EXPIRED, KEY, SECRET

from shards import remote_store
from shards.location import Url
from shards.remote_store import RemoteStore
from shards.store import CHUNK, at_once, open_store, read_chunks


@pytest.fixture
def store(bucket):
    return open_store("s3://bucket/set")


def write(store, name, data):
    with store.write(name) as stream:
        stream.write(data)


def test_what_is_written_is_read_listed_and_deleted(store):
    assert store.list() == []
    assert not store.exists("b")
    assert store.size("b") is None
    write(store, "b", b"bytes")
    write(store, "a", b"")
    write(store.folder("images"), "c", b"in a folder")
    assert store.list() == ["a", "b", "images"]
    assert store.folder("images").list() == ["c"]
    assert store.size("images") is None
    assert (store.read("b"), store.size("b"), store.read("a"), store.size("a")) == (b"bytes", 5, b"", 0)
    write(store, "b", b"others")
    assert store.read("b") == b"others"
    store.delete("b")
    store.delete("b")
    assert store.list() == ["a", "images"]
    for read in (store.read, lambda name: store.read_ranges(name, [(0, 1)])):
        with pytest.raises(FileNotFoundError) as caught:
            read("b")
        assert caught.value.filename == "s3://bucket/set/b"


def test_a_file_is_one_object_uploaded_when_the_block_ends(store, bucket):
    with store.write("a") as stream:
        stream.write(b"1")
        stream.write(b"2")
        stream.seek(0)
        assert stream.read() == b"12"
        assert not store.exists("a")
    assert [request for request in bucket.requests if "PUT" in request] == ["PUT /bucket/set/a"]


def interrupted_write(store, name):
    with store.write(name) as stream:
        stream.write(b"new")
        raise RuntimeError("power cut")


def test_what_is_new_replaces_nothing_and_is_checked_by_the_upload_itself(store, bucket):
    for again in (False, True):
        bucket.requests.clear()
        with pytest.raises(FileExistsError) if again else nullcontext(), store.write("a", new=True) as stream:
            stream.write(b"second" if again else b"first")
        assert bucket.requests == ["PUT /bucket/set/a"]
    assert store.read("a") == b"first"


def test_a_write_that_fails_leaves_the_old_file_and_uploads_nothing(store, bucket):
    write(store, "a", b"old")
    with pytest.raises(RuntimeError, match="power cut"):
        interrupted_write(store, "a")
    assert store.read("a") == b"old"
    assert len([request for request in bucket.requests if "PUT" in request]) == 1


def test_a_large_file_is_uploaded_in_parts_and_completed_last(store, bucket, monkeypatch):
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *_, **__: 5 << 20)
    data = os.urandom(1 << 20) * 11
    write(store, "a", data)
    sent = [request for request in bucket.requests if "set/a" in request]
    assert [request for request in sent if "partNumber" in request]
    assert sent[-1].startswith("POST /bucket/set/a?uploadId=")
    assert store.size("a") == len(data)
    bucket.fail("POST .*uploadId")
    with pytest.raises(OSError, match="3 tries failed"):
        write(store, "b", data)
    assert not store.exists("b")


def test_ranges_are_read_in_order_and_end_with_the_file(store):
    write(store, "a", bytes(range(10)))
    assert store.read_ranges("a", [(8, 5), (0, 2), (20, 3), (4, 0)]) == [b"\x08\x09", b"\x00\x01", b"", b""]


def test_chunks_make_up_the_file(store):
    data = os.urandom(2 * CHUNK + 5)
    write(store, "a", data)
    assert [len(chunk) for chunk in read_chunks(store, "a")] == [CHUNK, CHUNK, 5]
    assert b"".join(read_chunks(store, "a")) == data
    with pytest.raises(FileNotFoundError):
        list(read_chunks(store, "none"))


def test_reads_are_in_flight_together(store, bucket):
    write(store, "a", bytes(range(100)))
    bucket.delay = 0.02
    store.read_ranges("a", [(i, 1) for i in range(16)])
    assert bucket.most > 1
    assert list(at_once(store, lambda i: store.read_ranges("a", [(i, 1)]), range(40))) == [
        [bytes([i])] for i in range(40)
    ]


def test_a_store_is_taken_to_another_process_without_what_it_holds_open(store):
    write(store, "a", b"bytes")
    again = pickle.loads(pickle.dumps(store))
    assert again == store
    assert again.read("a") == b"bytes"


@pytest.mark.parametrize(
    ("matching", "fault"),
    [
        ("GET", {"kind": "status"}),
        ("GET", {"kind": "status", "status": 503}),
        ("GET", {"kind": "cut"}),
        ("GET", {"kind": "short"}),
        ("HEAD", {"kind": "status"}),
    ],
)
def test_what_may_pass_is_tried_again(store, bucket, matching, fault):
    write(store, "a", bytes(range(100)))
    bucket.fail(matching, left=1, **fault)
    assert store.read("a") == bytes(range(100))
    assert bucket.faults[0].left == 0
    bucket.fail("PUT", left=1)
    write(store, "b", b"bytes")
    assert store.read("b") == b"bytes"


@pytest.fixture
def impatient(bucket, monkeypatch):
    """A server that does not answer is soon given up."""
    monkeypatch.setattr(remote_store, "ANSWER_SECONDS", 0.5)
    remote_store.file_system.cache_clear()
    yield
    remote_store.file_system.cache_clear()


def test_a_server_that_hangs_is_given_up_and_asked_again(impatient, store, bucket):
    write(store, "a", b"bytes")
    bucket.fail("GET", kind="hang", left=1)
    assert store.read("a") == b"bytes"
    bucket.fail("GET", kind="hang")
    with pytest.raises(OSError, match="3 tries failed, the last with: .*Timeout"):
        store.read_ranges("a", [(0, 1)])


@pytest.mark.parametrize(
    ("matching", "fault", "said"),
    [
        ("GET", {"kind": "status"}, "3 tries failed, the last with: 500 InternalError"),
        ("GET", {"kind": "cut"}, "3 tries failed, the last with: ContentLengthError"),
        ("GET", {"kind": "short"}, "3 tries failed, the last with: 50 of 100 bytes came"),
    ],
)
def test_tries_are_bounded_and_the_error_names_the_object(store, bucket, matching, fault, said):
    write(store, "a", bytes(range(100)))
    bucket.fail(matching, **fault)
    for read in (store.read, lambda name: store.read_ranges(name, [(0, 100)])):
        with pytest.raises(OSError, match=said) as caught:
            read("a")
        assert caught.value.filename == "s3://bucket/set/a"
        assert "Check the network and the service" in caught.value.strerror
        assert not isinstance(caught.value, FileNotFoundError)


def test_expired_credentials_are_said_at_once(store, bucket):
    write(store, "a", b"bytes")
    bucket.fail("GET|PUT", status=400, body=EXPIRED)
    bucket.fail("HEAD", status=403)
    bucket.requests.clear()
    for use in (store.read, store.size, store.exists, lambda name: write(store, name, b"")):
        with pytest.raises(PermissionError, match="access was denied .* have not expired") as caught:
            use("a")
        assert caught.value.filename == "s3://bucket/set/a"
    with pytest.raises(PermissionError, match="ExpiredToken: The provided token has expired"):
        store.read_ranges("a", [(0, 1)])
    assert len(bucket.requests) == 5


def test_without_credentials_the_remedy_is_said(store, impatient, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    remote_store.file_system.cache_clear()
    with pytest.raises(PermissionError, match="Check that the credentials which s3fs finds are valid"):
        store.read("a")


def test_a_missing_bucket_is_said(bucket):
    store = open_store("s3://no-such-bucket/set")
    for use in (lambda: store.read("a"), store.list, lambda: write(store, "a", b"")):
        with pytest.raises(OSError, match="there is no such bucket .* Check the address") as caught:
            use()
        assert not isinstance(caught.value, FileNotFoundError)


def test_no_error_shows_a_secret(store, bucket):
    said = f"for AWS {KEY}: https://u:p@host/x?X-Amz-Signature=0123 {'a' * 40}"
    bucket.fail("GET", status=403, body=f"<Error><Code>AccessDenied</Code><Message>{said}</Message></Error>".encode())
    with pytest.raises(PermissionError) as caught:
        store.read_ranges("a", [(0, 1)])
    shown = str(caught.value)
    assert not [secret for secret in (SECRET, "u:p", "0123", "a" * 40) if secret in shown]
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_two_writers_of_one_file_do_no_harm(store):
    data = os.urandom(1 << 16)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: write(store, "a", data), range(8)))
    assert store.read("a") == data


def test_a_hub_that_may_not_be_asked_is_not_asked_again(monkeypatch):
    monkeypatch.setattr(remote_store.time, "sleep", lambda _: pytest.fail("it waits"))
    store, offline = open_store("hf://datasets/owner/name"), type("OfflineModeIsEnabled", (ConnectionError,), {})

    def refused(files):
        raise offline("HF_HUB_OFFLINE is set")

    with pytest.raises(OSError, match="the network was not asked .* Unset HF_HUB_OFFLINE"):
        store._try("a", refused)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(OSError, match="needs the library gcsfs. Install it: pip install gcsfs"):
        RemoteStore(Url("gs://bucket/a")).read("b")


class Ranges(SimpleHTTPRequestHandler):
    """A directory over http, with ranges, for those who know the signature."""

    protocol_version = "HTTP/1.1"
    ranges, statuses = True, {}

    def do_GET(self):
        path, _, query = self.path.partition("?")
        status = self.statuses.get(path) or (200 if query == "sig=secret" else 403)
        place = Path(self.translate_path(path))
        try:
            if status == 200 and place.is_dir():
                data = "".join(f'<a href="{child.name}">{child.name}</a>' for child in place.iterdir()).encode()
            else:
                data = place.read_bytes() if status == 200 else b""
        except OSError:
            status, data = 404, b""
        asked = self.headers.get("Range") if self.ranges else None
        if asked and status == 200:
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            status, data = (206, data[first : last + 1]) if first < len(data) else (416, b"")
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_store, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(Ranges, "statuses", {})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").write_bytes(bytes(range(10)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Ranges(*args, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield open_store(f"http://127.0.0.1:{server.server_address[1]}/set?sig=secret")
    server.shutdown()
    server.server_close()


def test_the_web_is_read_with_a_signature_that_is_never_shown(web):
    assert (web.read("a"), web.size("a"), web.size("b")) == (bytes(range(10)), 10, None)
    assert web.list() == ["a"]
    assert web.read_ranges("a", [(8, 5), (20, 1), (0, 2)]) == [b"\x08\x09", b"", b"\x00\x01"]
    with pytest.raises(FileNotFoundError) as caught:
        web.read("b")
    assert "secret" not in str(caught.value)
    assert "secret" not in f"{web}{web!r}"


def test_the_web_is_read_only(web):
    with pytest.raises(OSError, match="nothing can be written over http"), web.write("a"):
        pass
    with pytest.raises(OSError, match="nothing can be deleted over http"):
        web.delete("a")


def test_a_failing_web_server_is_not_a_missing_file(web):
    Ranges.statuses["/set/a"] = 500
    for use in (web.read, web.size, web.exists):
        with pytest.raises(OSError, match="3 tries failed, the last with: .*500") as caught:
            use("a")
        assert not isinstance(caught.value, FileNotFoundError)
        assert "secret" not in str(caught.value)
    Ranges.statuses["/set/a"] = 403
    with pytest.raises(PermissionError, match="access was denied"):
        web.size("a")


def test_a_web_server_without_ranges_is_refused(web, monkeypatch):
    monkeypatch.setattr(Ranges, "ranges", False)
    with pytest.raises(OSError, match="Use one that answers to ranges"):
        web.read_ranges("a", [(2, 3)])
