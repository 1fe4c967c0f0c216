"""A bucket on the loopback: moto's server, and a proxy before it that answers late, wrongly or not at all."""

from __future__ import annotations

import http.client
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY, SECRET = "key-of-the-tests", "secret-of-the-tests"
SERVER_ERROR = b"<Error><Code>InternalError</Code><Message>We failed. Please try again.</Message></Error>"
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
HOP = {"transfer-encoding", "connection", "keep-alive", "server", "date"}


@dataclass
class Fault:
    """What happens to requests whose method and path match: `status` with a body, `cut` bodies of half the length that
    they state, `short` ones that state half, `hang`: no answer. `left` of them; None for all."""

    matching: str
    kind: str
    left: int | None = None
    status: int = 500
    body: bytes = SERVER_ERROR

    def applies(self, request: str) -> bool:
        if self.left == 0 or not re.search(self.matching, request):
            return False
        self.left = self.left if self.left is None else self.left - 1
        return True


@dataclass
class Bucket:
    """An S3 server at `endpoint`, seen through a proxy. `requests` are the methods and paths that came by, and `most`
    is how many of them waited at once."""

    endpoint: str
    delay: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    waiting: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, matching: str, kind: str = "status", **changes) -> Fault:
        fault = Fault(matching, kind, **changes)
        self.faults.append(fault)
        return fault

    def reset(self) -> None:
        self.delay, self.faults, self.requests, self.most = 0.0, [], [], 0


def handler(bucket: Bucket, host: str, port: int) -> type[BaseHTTPRequestHandler]:
    behind = threading.local()

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Without it, small answers wait for acknowledgements.
        disable_nagle_algorithm = True

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = f"{self.command} {self.path}"
            with bucket.lock:
                bucket.requests.append(request)
                fault = next((fault for fault in bucket.faults if fault.applies(request)), None)
                bucket.waiting += 1
                bucket.most = max(bucket.most, bucket.waiting)
            time.sleep(bucket.delay)
            with bucket.lock:
                bucket.waiting -= 1
            if fault and fault.kind == "hang":
                time.sleep(2)
                self.close_connection = True
                return
            if fault and fault.kind == "status":
                self.answer(fault.status, {}, b"" if self.command == "HEAD" else fault.body)
                return
            status, headers, data = self.ask(body)
            if fault and fault.kind == "short":
                data = data[: len(data) // 2]
                headers = {name: value for name, value in headers.items() if name != "Content-Length"}
            elif fault and fault.kind == "cut":
                self.answer(status, headers, data[: len(data) // 2], stated=len(data))
                self.close_connection = True
                return
            self.answer(status, headers, data)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

        def ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            if not hasattr(behind, "connection"):
                behind.connection = http.client.HTTPConnection(host, port)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
            behind.connection.request(self.command, self.path, body=body, headers=headers)
            answer = behind.connection.getresponse()
            data = answer.read()
            return answer.status, {k: v for k, v in answer.getheaders() if k.lower() not in HOP}, data

        def answer(self, status: int, headers: dict[str, str], data: bytes, stated: int | None = None) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() != "content-length":
                    self.send_header(name, value)
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(data) if stated is None else stated))
            self.end_headers()
            self.wfile.write(data)
            self.wfile.flush()

        def log_message(self, *_: object) -> None:
            pass

    return Proxy


@contextmanager
def s3_server() -> Iterator[Bucket]:
    """moto's S3 server behind a proxy, while the block runs."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    bucket = Bucket("")
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler(bucket, *server.get_host_and_port()))
    proxy.daemon_threads = True
    bucket.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield bucket
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()


def environment(bucket: Bucket) -> dict[str, str]:
    """The environment in which s3:// addresses lead to the bucket's server."""
    return {
        "AWS_ENDPOINT_URL": bucket.endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        # botocore's checksums of streamed uploads take a form that older servers do not know.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }


def create() -> None:
    """Make the bucket, without a request."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket("bucket", "us-east-1")


def fill(name: str, folder: Path) -> None:
    """Put every file below a folder into the bucket, below `name`, without a request."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            backend.put_object("bucket", f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def held(name: str) -> dict[str, bytes]:
    """What the bucket holds below `name`, without a request."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    keys = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets["bucket"].keys
    return {key.removeprefix(f"{name}/"): keys[key].value for key in sorted(keys) if key.startswith(f"{name}/")}


@dataclass(frozen=True)
class Elsewhere:
    """A dataset that a loader process reads with an environment of its own: the server of processes began with another
    one."""

    dataset: Any
    environment: dict[str, str]

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def in_flight(self) -> int:
        return self.dataset.in_flight

    @property
    def rounds(self) -> int:
        return self.dataset.rounds

    def counts(self) -> list[int]:
        return self.dataset.counts()

    def __getitems__(self, indices: list[int]) -> list[Any]:
        os.environ.update(self.environment)
        return self.dataset.__getitems__(indices)

    def collate(self, entries: list[Any]) -> Any:
        return self.dataset.collate(entries), os.getpid()
