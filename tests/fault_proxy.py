"""A proxy before an object store that makes requests fail, counts them, and lets a test act in the middle of them.

A test states what goes wrong as a function from a request to a `Fault`, and changes it at any time:

    proxy.fault = errors(0.2)             # every fifth request is answered 503 or 429
    proxy.fault = slow(0.1)
    proxy.fault = forbidden               # from now on
    proxy.fault = lambda request: CUT if request.kind == "upload" else None

The function runs in a thread while the client waits, so it may also kill the client, or look at what has arrived.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator

import aiohttp
import yarl
from aiohttp import web

_NOT_FORWARDED = {"host", "content-length", "transfer-encoding", "connection", "keep-alive"}
_MESSAGES = {403: "the caller has no access to the object", 429: "too many requests", 503: "backend error"}
_S3_CODES = {403: "AccessDenied", 429: "TooManyRequests", 503: "SlowDown"}


@dataclasses.dataclass(frozen=True)
class Request:
    """A request as a fault sees it.

    Attributes:
      kind: "upload" (of contents), "start" (of an upload in several requests), "read", "list", "stat", "delete", "copy"
        or "other".
      name: name of the object, or "" if it has none.
      size: bytes in its body.
    """

    kind: str
    name: str
    size: int


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to a request.

    Attributes:
      status: answer with this status, without asking the store.
      seconds: wait this long first.
      cut: close the connection, without asking the store.
      keep: share of the body that reaches the store.
    """

    status: int | None = None
    seconds: float = 0.0
    cut: bool = False
    keep: float = 1.0


CUT = Fault(cut=True)
HALF = Fault(keep=0.5)


def no_fault(request: Request) -> Fault | None:
    return None


def forbidden(request: Request) -> Fault | None:
    return Fault(status=403)


def outage(request: Request) -> Fault | None:
    return Fault(status=503)


def errors(rate: float, statuses: tuple[int, ...] = (503, 429), seed: int = 0) -> Callable[[Request], Fault | None]:
    """Returns a fault that answers this share of the requests with one of the statuses."""
    rng = random.Random(seed)
    return lambda request: Fault(status=rng.choice(statuses)) if rng.random() < rate else None


def slow(seconds: float) -> Callable[[Request], Fault | None]:
    """Returns a fault that delays every answer."""
    return lambda request: Fault(seconds=seconds)


class Proxy:
    """The proxy of a store. See the module's docstring.

    Attributes:
      url: address of the proxy.
      bucket: URL of the test's bucket.
      fault: decides about each request.
      requests: number of requests by kind, those that failed included.
      failed: number of the requests that a fault answered or cut, by kind.
      sent: bytes of bodies from clients, by kind.
      received: bytes of bodies from the store, by kind.
    """

    def __init__(self, store: str):
        self.url = self.bucket = ""
        self.fault: Callable[[Request], Fault | None] = no_fault
        self._store = store
        self.requests, self.failed = collections.Counter(), collections.Counter()
        self.sent, self.received = collections.Counter(), collections.Counter()

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        body = await http.read()
        request = Request(*kind_and_name(http.method, http.raw_path, body), len(body))
        self.requests[request.kind] += 1
        self.sent[request.kind] += len(body)
        # In a thread: a fault may wait for something, while other requests go on.
        fault = await asyncio.to_thread(self.fault, request) or Fault()
        await asyncio.sleep(fault.seconds)
        if fault.cut or fault.status:
            self.failed[request.kind] += 1
        if fault.cut:
            http.transport.abort()
            return web.Response()
        if fault.status:
            return _error(fault.status, is_google=_is_google(http.path))
        body = body[: int(len(body) * fault.keep)]
        headers = {key: value for key, value in http.headers.items() if key.lower() not in _NOT_FORWARDED}
        url = yarl.URL(self._store + http.raw_path, encoded=True)
        send = self._session.request(http.method, url, data=body, headers=headers, allow_redirects=False)
        async with send as answer:
            content = await answer.read()
            self.received[request.kind] += len(content)
            kept = {key: value for key, value in answer.headers.items() if key.lower() not in _NOT_FORWARDED}
            # Addresses of resumable uploads and of contents must lead here again.
            kept = {key: value.replace(self._store, self.url) for key, value in kept.items()}
            if "json" in answer.headers.get("Content-Type", ""):
                content = content.replace(self._store.encode(), self.url.encode())
            if http.method == "HEAD" and "Content-Length" in answer.headers:
                kept["Content-Length"] = answer.headers["Content-Length"]
            return web.Response(status=answer.status, headers=kept, body=content)

    async def _serve(self, ready: threading.Event, ended: asyncio.Event) -> None:
        app = web.Application(client_max_size=2**40)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(auto_decompress=False, connector=connector) as self._session:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            ready.set()
            await ended.wait()
            await runner.cleanup()


@contextlib.contextmanager
def proxy(store: str) -> Iterator[Proxy]:
    """Runs a proxy of the store at this URL in a thread."""
    result, ready, ended, loop = Proxy(store), threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(result._serve(ready, ended)), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield result
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


def kind_and_name(method: str, target: str, body: bytes = b"") -> tuple[str, str]:
    """Returns the kind of a request and the name of its object, in the protocol of Google or of S3.

    Args:
      method: method of HTTP.
      target: path and query, still percent-encoded.
      body: body of the request. The first part of a multipart upload names its object.
    """
    path, _, query = target.partition("?")
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    if not _is_google(path):
        name = urllib.parse.unquote(path.lstrip("/").partition("/")[2])
        kinds = {"PUT": "upload", "POST": "start", "GET": "read", "HEAD": "stat", "DELETE": "delete"}
        return (
            kinds[method] if name else "list" if method == "GET" else "delete" if "delete" in options else "other"
        ), name
    if path.startswith("/upload/"):
        if options["uploadType"] == "multipart" and (match := re.search(rb'"name": *("(?:[^"\\]|\\.)*")', body[:4096])):
            return "upload", json.loads(match[1])
        is_start = options["uploadType"] == "resumable" and "upload_id" not in options
        return "start" if is_start else "upload", options.get("name", "")
    if match := re.fullmatch(r"(/download)?/storage/v1/b/[^/]+/o(?:/(?P<name>[^/]+)(?P<action>/.*)?)?", path):
        name = urllib.parse.unquote(match["name"] or "")
        if method == "GET":
            return ("list" if not name else "read" if match[1] or options.get("alt") == "media" else "stat"), name
        return ("delete" if method == "DELETE" else "copy" if match["action"] else "other"), name
    return "delete" if path.startswith("/batch/") else "other", ""


def _is_google(path: str) -> bool:
    return path.startswith(("/storage/", "/upload/", "/download/", "/batch/"))


def _error(status: int, is_google: bool) -> web.Response:
    """Returns an answer with this status as the store words it."""
    if is_google:
        return web.json_response({"error": {"code": status, "message": _MESSAGES[status]}}, status=status)
    body = f"<Error><Code>{_S3_CODES[status]}</Code><Message>{_MESSAGES[status]}</Message></Error>"
    return web.Response(status=status, text=body, content_type="application/xml")
