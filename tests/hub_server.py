"""A small Hugging Face Hub on loopback: the part of its HTTP interface that `huggingface_hub` uses here.

    hub = HubServer()
    hub.add("org/llama", {"config.json": b"{}", "model.safetensors": weights})
    ... huggingface_hub with HF_ENDPOINT = hub.url ...

Repositories are dicts of files by commit. Revisions, gated and private repositories, ranges, ETags and redirect-free
downloads behave as the Hub's do, with its error codes in `X-Error-Code`. Uploads take the LFS way: preupload, batch,
PUT, verify and commit. `requests` records what was asked for, and `fail` makes the server break.
"""

import base64
import dataclasses
import hashlib
import json
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from alignvlm_jax.downloads import hub

TOKEN = "hf_valid"
READ_TOKEN = "hf_read"
USER = "anna"
ORGANIZATION = "lab"

# Files of this size or larger are stored with LFS, as weights are on the Hub.
LFS_BYTES = 2_000


@dataclasses.dataclass
class Repository:
    """A repository: its commits, and the names of some of them."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    gated: str | bool = False
    private: bool = False
    license: str | None = None

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Adds a commit, makes `ref` point to it, and returns its name."""
        text = json.dumps([len(self.commits), *sorted((name, _sha(content)) for name, content in files.items())])
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = dict(files)
        self.refs[ref] = name
        return name


class HubServer:
    """The server; `close` ends it.

    Attributes:
      url: value for HF_ENDPOINT.
      repositories: repositories by kind ("models", "datasets") and name.
      requests: method and path of every request so far.
      fail: called with method and path; returns a status with which the request fails, "cut" to close the connection in
        the middle of a file, or None.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.blobs: dict[str, bytes] = {}
        self.fail = lambda method, path: None
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def add(self, name: str, files: Mapping[str, bytes], *, kind: str = "models", **options) -> str:
        """Adds a repository with one commit on main, and returns the commit's name."""
        repository = self.repositories.setdefault((kind, name), Repository(**options))
        return repository.commit(files)

    def downloads(self) -> list[str]:
        """Returns the names of the files that were downloaded, in order."""
        paths = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return [urllib.parse.unquote(path.split("/resolve/")[1].partition("/")[2]) for path in paths]

    def clear(self) -> None:
        """Removes all repositories, and forgets what was requested."""
        self.repositories.clear()
        self.requests.clear()
        self.fail = lambda method, path: None

    def close(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def use(server: HubServer, folder: pathlib.Path, monkeypatch) -> None:
    """Makes the server the Hub of this process, with a cache of its own in `folder` and without a token."""
    from huggingface_hub import constants

    # The library reads its environment when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub_cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    forget()


def forget() -> None:
    """Forgets what this process knows about the Hub, as a new process does."""
    from huggingface_hub import _tree_cache

    hub.list_files.cache_clear()
    hub._say_once.cache_clear()
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def do_PUT(self):
        self._answer()

    def log_message(self, *args):
        pass

    def _answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(length)
        parts = urllib.parse.urlsplit(self.path)
        path, self.query = parts.path, urllib.parse.parse_qs(parts.query)
        self.hub.requests.append((self.command, path))
        self.failure = self.hub.fail(self.command, path)
        if isinstance(self.failure, int):
            return self._error(self.failure, None, "The server failed.")
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, path):
                return getattr(self, method)(**{key: urllib.parse.unquote(v) for key, v in match.groupdict("").items()})
        return self._error(404, None, f"No route for {path}")

    # Reading.

    def _find(self, kind: str, name: str, revision: str) -> tuple[Repository, str] | None:
        """Returns a repository and the commit of a revision, or answers with the Hub's error."""
        repository = self.hub.repositories.get((kind or "models", name))
        is_known = self._token() in (TOKEN, READ_TOKEN)
        if self._token() is not None and not is_known:
            return self._error(401, None, "Invalid credentials in Authorization header")
        if repository is None or (repository.private and not is_known):
            # Without a token, the Hub does not tell which repositories exist.
            return self._error(404 if is_known else 401, "RepoNotFound", "Repository not found")
        revision = revision or "main"
        commit = repository.refs.get(revision) or (revision if revision in repository.commits else None)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def _info(self, kind, name, revision=""):
        if (found := self._find(kind, name, revision)) is None:
            return
        repository, commit = found
        siblings = [
            {"rfilename": file, **_tree_entry(file, content)} for file, content in repository.commits[commit].items()
        ]
        self._json(
            {
                "_id": "1",
                "id": name,
                "sha": commit,
                "private": repository.private,
                "gated": repository.gated,
                "disabled": False,
                "cardData": {"license": repository.license} if repository.license else {},
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )

    def _tree(self, kind, name, revision):
        if (found := self._find(kind, name, revision)) is not None:
            repository, commit = found
            self._json(
                [
                    {"type": "file", "path": file, **_tree_entry(file, content)}
                    for file, content in repository.commits[commit].items()
                ]
            )

    def _refs(self, kind, name):
        if (found := self._find(kind, name, "main")) is not None:
            repository, _ = found
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                for name, commit in repository.refs.items()
            ]
            self._json({"branches": branches, "tags": [], "converts": []})

    def _resolve(self, name, revision, file, kind=""):
        if (found := self._find(kind, name, revision)) is None:
            return
        repository, commit = found
        if repository.gated and self._token() != TOKEN:
            status, message = (401, "Access is restricted") if self._token() is None else (403, "not in the list")
            return self._error(status, "GatedRepo", message)
        content = repository.commits[commit].get(file)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_sha(content)}"', "Accept-Ranges": "bytes"}
        status, begin = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            status, begin = 206, int(match[1])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self._send(status, content[begin:], headers, cut=self.failure == "cut" and self.command == "GET")

    # Writing.

    def _whoami(self):
        token = self._token()
        if token not in (TOKEN, READ_TOKEN):
            return self._error(401, None, "Invalid credentials in Authorization header")
        role = "write" if token == TOKEN else "read"
        self._json(
            {
                "type": "user",
                "id": "1",
                "name": USER,
                "orgs": [{"name": ORGANIZATION}],
                "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": role}},
            }
        )

    def _create(self):
        request = json.loads(self.body)
        owner = request.get("organization") or USER
        name = f"{owner}/{request['name']}"
        if self._token() != TOKEN or owner not in (USER, ORGANIZATION):
            return self._error(403, None, f"You don't have the rights to create a model under the namespace {owner}")
        key = (f"{request.get('type') or 'model'}s", name)
        url = f"{self.hub.url}/{name}"
        if key in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": url}, status=409)
        # Version 2 of the library says "visibility", version 1 says "private".
        is_private = request.get("private") or request.get("visibility") == "private"
        self.hub.repositories[key] = Repository(private=bool(is_private))
        self.hub.repositories[key].commit({".gitattributes": b""})
        self._json({"url": url, "name": name})

    def _preupload(self, kind, name, revision):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LFS_BYTES else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def _lfs_batch(self, name):
        objects = [
            {
                "oid": item["oid"],
                "size": item["size"],
                "actions": {
                    "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs-verify"},
                },
            }
            for item in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid):
        self.hub.blobs[oid] = self.body
        self._json({})

    def _accept(self):
        self._json({"errors": [], "warnings": []})

    def _commit(self, kind, name, revision):
        if self._token() != TOKEN:
            return self._error(403, None, "Your token cannot write")
        repository = self.hub.repositories[(kind, name)]
        files = dict(repository.commits[repository.refs["main"]])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    # Answers.

    def _token(self) -> str | None:
        text = self.headers.get("authorization")
        return text.removeprefix("Bearer ") if text else None

    def _json(self, content, status=200):
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status, code, message, headers=None):
        codes = {"X-Error-Code": code} if code else {}
        self._send(status, b"", {"X-Error-Message": message, **codes, **(headers or {})})

    def _send(self, status, content, headers, cut=False):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _tree_entry(file: str, content: bytes) -> dict:
    entry = {"oid": hashlib.sha1(content).hexdigest(), "blobId": hashlib.sha1(content).hexdigest()}
    entry["size"] = len(content)
    if len(content) >= LFS_BYTES:
        entry["lfs"] = {"oid": _sha(content), "sha256": _sha(content), "size": len(content), "pointerSize": 130}
    return entry


_NAME = r"(?P<name>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_NAME}"
_ROUTES = (
    (r"/api/whoami-v2", "_whoami"),
    (r"/api/repos/create", "_create"),
    (r"/api/validate-yaml", "_accept"),
    (r"/lfs-verify", "_accept"),
    (r"/lfs/(?P<oid>[0-9a-f]+)", "_lfs_put"),
    (_API, "_info"),
    (rf"{_API}/revision/(?P<revision>.+)", "_info"),
    (rf"{_API}/tree/(?P<revision>[^/]+)", "_tree"),
    (rf"{_API}/refs", "_refs"),
    (rf"{_API}/preupload/(?P<revision>[^/]+)", "_preupload"),
    (rf"{_API}/commit/(?P<revision>[^/]+)", "_commit"),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", "_lfs_batch"),
    (rf"/(?:(?P<kind>datasets)/)?{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "_resolve"),
)
