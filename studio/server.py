"""HTTP for one person on one machine: the page and the calls of Label and Draw, on 127.0.0.1 only.

A URL is /TOKEN/ for the page, /TOKEN/FILE for its files and /TOKEN/api/CALL/NUMBER for a call. A
call is a function (number, body) -> dict (sent as JSON), (media type, bytes), or an iterator of
dicts, each sent as a line of JSON as soon as it is there. Images are numbers, so no path ever comes
from the browser. Another site in the same browser knows no token, and its requests are refused by
Host and Origin as well.
"""
from __future__ import annotations

import json
import re
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator
from hmac import compare_digest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import checkpoint

PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
URL = re.compile(r"/([\w%-]+)/(?:api/(\w+)(?:/([0-9]+))?|([\w.]*))", re.ASCII)
BODY_MOST = 32 << 20            # bytes; a COCO json of 50,000 people has about as many
HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
           "X-Content-Type-Options": "nosniff", "Content-Security-Policy":
           "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"}
Answer = dict | tuple[str, bytes] | Iterator[dict]
Call = Callable[[int, dict | bytes], Answer]


class Refused(ValueError):
    """A request that is answered with this status and sentence."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


class Studio(ThreadingHTTPServer):
    """The server; `calls` are by method and name, such as {"GET pose": f}. Port 0 is any free one.
    """
    daemon_threads = True       # Ctrl-C does not wait for a browser

    def __init__(self, calls: dict[str, Call], port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.calls, self.token = calls, secrets.token_urlsafe(16)
        self.files = {path.name: path.read_bytes() for path in PAGE.iterdir()}
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        self.url = f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):        # the browser closed the connection
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    timeout = 60                # seconds without a byte, before a connection is closed
    server: Studio

    def do_GET(self) -> None:
        try:
            status, answer = 200, self.answer()
        except (ValueError, RuntimeError, OSError) as error:
            status, answer = getattr(error, "status", 400), {"error": sentence(error)}
        except Exception:               # a fault of ours: the page says so, the terminal has more
            traceback.print_exc()
            status, answer = 500, {"error": "the server failed; the terminal has the details"}
        kind, content = answer if isinstance(answer, tuple) else ("application/json", None)
        self.send_response(status)
        for name, value in {"Content-Type": kind, **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        if content is None:
            self.send_lines(answer)
        else:
            self.wfile.write(content)

    do_POST = do_GET

    def answer(self) -> Answer:
        """What the request asks for; Refused, or what a call raises."""
        if self.headers.get("Host") not in self.server.hosts:
            raise Refused(403, "this server answers only to 127.0.0.1 and localhost")
        origin = self.headers.get("Origin", f"http://{self.headers['Host']}")
        if origin.removeprefix("http://") not in self.server.hosts:
            raise Refused(403, "another site may not use this server")
        found = URL.fullmatch(self.path)
        if found is None:
            raise Refused(404, "there is no such page")
        token, call, number, file = found.groups("")
        if not compare_digest(token, self.server.token):
            raise Refused(403, "the token is wrong; open the URL that the terminal shows")
        if f"{self.command} {call}" in self.server.calls:
            return self.server.calls[f"{self.command} {call}"](int(number or 0), self.body())
        file = file or "index.html"
        if call or file not in self.server.files:
            raise Refused(404, "there is no such call or file; reload the page")
        return TYPES[Path(file).suffix], self.server.files[file]

    def body(self) -> dict | bytes:
        """The body of a POST: an object of JSON, or any bytes."""
        length = int(self.headers.get("Content-Length") or 0)
        if length > BODY_MOST:
            raise Refused(413, f"the file has {length / 1e6:.0f} MB; at most {BODY_MOST / 1e6:.0f} "
                               "MB are allowed, so give a smaller one")
        content = self.rfile.read(length)
        if self.headers.get("Content-Type") != "application/json":
            return content
        parsed = json.loads(content or b"{}")
        if not isinstance(parsed, dict):
            raise Refused(400, "an object is needed")
        return parsed

    def send_lines(self, answer: dict | Iterator[dict]) -> None:
        """Sends each line at once. When the browser goes away, the iterator is closed."""
        try:
            for line in [answer] if isinstance(answer, dict) else answer:
                self.wfile.write(json.dumps(line).encode() + b"\n")
        except (ValueError, RuntimeError) as error:
            self.wfile.write(json.dumps({"error": sentence(error)}).encode() + b"\n")
        finally:
            if not isinstance(answer, dict):
                answer.close()

    def log_message(self, *args: object) -> None:
        pass


def sentence(error: Exception) -> str:
    """One sentence for the page."""
    if isinstance(error, RuntimeError) and checkpoint.out_of_memory(error):
        return "out of memory; draw fewer images at a time"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; nothing was changed, so fix this and try again"
    return str(error)
