"""What a download may fetch: http and https alone, no way from the web into private networks, bodies up to a limit.

`distill-sd download` has img2dataset's processes import a copy of this file as their `sitecustomize`, so it stands on
the standard library alone. `urllib.request.urlopen` then follows these rules.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import urllib.request
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

MAX_BODY_BYTES = 1 << 28
# A file to create, which tells `download` that the rules are in force.
MARKER = "DISTILL_SD_WEB_GUARD"
DEFAULT_PORTS = {"http": 80, "https": 443}


class GuardedRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects as urllib follows them, except those that lead to a private address of another server."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if server_of(newurl) != server_of(req.full_url) and is_private(newurl):
            raise URLError("redirected to a private address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class BoundedBodies(urllib.request.BaseHandler):
    """Responses whose `read` raises URLError instead of reading a body without measure."""

    def http_response(self, request: Any, response: Any) -> Any:
        read, length = response.read, response.length

        def bounded(amount: int | None = None) -> bytes:
            if amount is not None:
                return read(amount)
            # With a stated length, a body that ends early must raise an error, and read() alone does that.
            data = read() if length is not None and length <= MAX_BODY_BYTES else read(MAX_BODY_BYTES + 1)
            if len(data) > MAX_BODY_BYTES:
                raise URLError(f"the body has more than {MAX_BODY_BYTES} bytes")
            return data

        response.read = bounded
        return response

    https_response = http_response


def server_of(url: str) -> tuple[str | None, int | None]:
    """Host and port of a URL. The default ports of http and https count as one, since servers redirect between them."""
    parts = urlsplit(url)
    port = parts.port or DEFAULT_PORTS.get(parts.scheme)
    return parts.hostname, None if port in DEFAULT_PORTS.values() else port


def is_private(url: str) -> bool:
    """Whether the host of a URL has an address that is not on the public internet. False if it has none."""
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname, None)
    except OSError:
        return False
    return any(not is_public(ipaddress.ip_address(str(info[4][0]).partition("%")[0])) for info in found)


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_global and not (mapped or address).is_multicast


def guarded_opener() -> urllib.request.OpenerDirector:
    """An opener for http and https: no files, no ftp, no data URLs."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        GuardedRedirects(),
        BoundedBodies(),
    ):
        opener.add_handler(handler)
    return opener


def install() -> None:
    """Make `urlopen` follow the rules in this process, and say so."""
    urllib.request.install_opener(guarded_opener())
    if os.environ.get(MARKER):
        with open(os.environ[MARKER], "wb"):
            pass


if __name__ == "sitecustomize":
    install()
