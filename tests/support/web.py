"""A web server on the loopback that answers as the web does, and lists of its addresses."""

import contextlib
import http.server
import io
import os
import shutil
import threading
import time

import pyarrow
import pyarrow.parquet
from PIL import Image

IMG2DATASET = shutil.which(os.environ.get("IMG2DATASET", "img2dataset"))
SLOW = 8


def encoded_image(number, size=(700, 600), format="JPEG", **options):
    stream = io.BytesIO()
    Image.new("RGB", size, (number * 7 % 256, 90, 120)).save(stream, format, **options)
    return stream.getvalue()


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as the web does: what comes is in the path's first part."""

    hits: list[str] = []

    def do_GET(self):
        Server.hits.append(self.path)
        kind, name = self.path.strip("/").split("/")
        number = int(name.split(".")[0])
        body, status, headers = encoded_image(number), 200, {}
        if kind == "missing":
            body, status = b"gone", 404
        elif kind == "broken":
            body, status = b"oops", 500
        elif kind == "moved":
            body, status, headers = b"", 302, {"Location": f"/good/{name}"}
        elif kind == "loop":
            body, status, headers = b"", 302, {"Location": self.path}
        elif kind == "html":
            body, headers = b"<html>not a picture</html>", {"Content-Type": "text/html"}
        elif kind == "empty":
            body = b""
        elif kind == "animated":
            more = [Image.new("RGB", (700, 600), "red")]
            body = encoded_image(number, format="WEBP", save_all=True, append_images=more)
        elif kind == "refused":
            headers = {"X-Robots-Tag": "noai"}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) * (2 if kind == "cut" else 1)))
        self.end_headers()
        if kind == "slow":
            self.wfile.write(body[:100])
            self.wfile.flush()
            time.sleep(SLOW)
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(handler=Server):
    """The server's address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def write_list(path, rows):
    """`rows` of (address, caption) as a parquet file."""
    columns = {"url": [url for url, _ in rows], "generated_caption": [caption for _, caption in rows]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path
