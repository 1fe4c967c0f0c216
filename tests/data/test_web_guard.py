"""What a download may fetch, against servers on the loopback."""

import http.client
import http.server
import urllib.request
from urllib.error import HTTPError, URLError

import pytest
from support.web import serving

from pipeline.data import web_guard
from pipeline.data.web_guard import guarded_opener, is_private, server_of


class Handler(http.server.BaseHTTPRequestHandler):
    """Redirects to the URL after /to/, and else answers with as many bytes as the path says."""

    def do_GET(self):
        kind, _, rest = self.path[1:].partition("/")
        self.send_response(302 if kind == "to" else 404 if kind == "missing" else 200)
        if kind == "to":
            self.send_header("Location", rest)
        elif kind == "sized":
            self.send_header("Content-Length", rest)
        elif kind == "cut":
            self.send_header("Content-Length", "100")
        self.end_headers()
        if kind in ("sized", "open"):
            self.wfile.write(b"x" * int(rest))

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def servers():
    with serving(Handler) as one, serving(Handler) as two:
        yield one, two


def fetch(url):
    with guarded_opener().open(url, timeout=5) as response:
        return response.read()


def test_redirects_stay_on_a_private_server(servers):
    one, two = servers
    assert fetch(f"{one}/to/{one}/sized/5") == b"xxxxx"
    assert fetch(f"{one}/to//sized/5") == b"xxxxx"
    for target in (f"{two}/sized/5", two.replace("127.0.0.1", "localhost"), two.replace("127.0.0.1", "0177.0.0.1")):
        with pytest.raises(URLError, match="redirected to a private address"):
            fetch(f"{one}/to/{target}")
    with pytest.raises(URLError, match="redirected to a private address"):
        fetch(f"{one}/to/http://169.254.169.254/latest/meta-data")


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("http://10.1.2.3/", True),
        ("http://[::1]/", True),
        ("http://[::ffff:192.168.0.1]/", True),
        ("http://[fe80::1%lo]/", True),
        ("http://224.0.0.1/", True),
        ("http://100.64.0.1/", True),
        ("http://8.8.8.8/", False),
        ("http://[2606:4700::1111]/", False),
    ],
)
def test_private_addresses_are_known(url, private):
    assert is_private(url) is private


def test_http_and_https_of_a_host_are_one_server():
    assert server_of("http://images.lab/a") == server_of("https://images.lab/b")
    assert server_of("http://images.lab/a") != server_of("http://images.lab:8080/a")


def test_bodies_have_a_limit_whether_or_not_they_state_their_length(servers, monkeypatch):
    monkeypatch.setattr(web_guard, "MAX_BODY_BYTES", 1000)
    one, _ = servers
    for kind in ("sized", "open"):
        assert len(fetch(f"{one}/{kind}/1000")) == 1000
        with pytest.raises(URLError, match="the body has more than 1000 bytes"):
            fetch(f"{one}/{kind}/1001")


def test_a_body_that_ends_early_is_an_error_as_ever(servers):
    with pytest.raises(http.client.IncompleteRead):
        fetch(f"{servers[0]}/cut")
    with pytest.raises(HTTPError, match="404"):
        fetch(f"{servers[0]}/missing")


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/a", "data:text/plain,x"])
def test_other_schemes_are_not_known(url):
    with pytest.raises(URLError, match="unknown url type"):
        fetch(url)


def test_redirects_to_other_schemes_are_refused(servers):
    one, _ = servers
    for target in ("file:///etc/hostname", "ftp://127.0.0.1/a"):
        with pytest.raises((HTTPError, URLError)):
            fetch(f"{one}/to/{target}")


def test_the_rules_hold_for_urlopen_once_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.setenv(web_guard.MARKER, str(tmp_path / "marker"))
    web_guard.install()
    assert (tmp_path / "marker").exists()
    with pytest.raises(URLError, match="unknown url type"):
        urllib.request.urlopen(f"file://{tmp_path}/marker")
