"""A small HTTP server that answers as the Hugging Face Hub does, for the calls the project makes.

    GET /api/models/ID/revision/REVISION (also datasets): commit, files with sizes and hashes, card
    GET /ID/resolve/COMMIT/FILE (also /datasets/ID/…): the bytes, from a Range if one is asked for;
        for a large kind of file a redirect to another host, which must not be shown the token

It is used through HF_ENDPOINT, by the real huggingface_hub, in a process of its own.
"""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".bin")


@dataclass
class Repo:
    """`files` at `commit`, which `branch` points to. `gated`: nobody has access to the files.
    `sizes` are told instead of the true ones."""

    files: dict[str, bytes]
    commit: str
    branch: str = "main"
    gated: bool = False
    license: str | None = "apache-2.0"
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass
class Request:
    path: str
    start: int
    token: str | None


@dataclass
class Hub:
    """`models["owner/name"]` and `datasets[…]` are what it serves; `requests` what it was asked.

    `faults` are taken one by one by the requests for a file's bytes, in order: an int cuts the
    connection after so many bytes of the answer, "stall" with a number in front ("9000 stall")
    stops sending there and keeps the connection open, "503" answers so, "flip" damages a byte,
    "long" sends a byte too many.
    """

    models: dict[str, Repo] = field(default_factory=dict)
    datasets: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    faulty: str = ".safetensors"

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def of(self, name: str) -> list[Request]:
        return [request for request in self.requests if request.path.endswith(f"/{name}")]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        elsewhere = path.startswith("elsewhere/")
        path = path.removeprefix("elsewhere/")
        if path.startswith("api/"):
            kind, _, rest = path.removeprefix("api/").partition("/")
            id, _, revision = rest.partition("/revision/")
            self._info(getattr(self.hub, kind).get(id), id, revision)
        else:
            is_data = path.startswith("datasets/")
            id, _, rest = path.removeprefix("datasets/").partition("/resolve/")
            commit, _, name = rest.partition("/")
            repos = self.hub.datasets if is_data else self.hub.models
            if name.endswith(LARGE) and not elsewhere:
                place = self.hub.url.replace("127.0.0.1", "localhost")
                return self._answer(302, b"", {"Location": f"{place}/elsewhere{self.path}"})
            self._file(repos.get(id), commit, name)

    do_HEAD = do_GET

    def _info(self, repo: Repo | None, id: str, revision: str):
        if repo is None:
            # The Hub does not tell a stranger whether a repository is missing or private.
            return self._error(401, "RepoNotFound")
        if revision not in (repo.commit, repo.branch):
            return self._error(404, "RevisionNotFound")
        siblings = []
        for name, content in repo.files.items():
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"rfilename": name, "size": repo.sizes.get(name, len(content)), "blobId": git}
            if name.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        card = {"license": repo.license} if repo.license else {}
        self._answer(
            200,
            json.dumps(
                {"id": id, "sha": repo.commit, "siblings": siblings, "cardData": card, "tags": []}
            ).encode(),
        )

    def _file(self, repo: Repo | None, commit: str, name: str):
        if repo is None or commit != repo.commit or name not in repo.files:
            return self._error(404, "EntryNotFound")
        if repo.gated:
            return self._error(403 if self.headers["Authorization"] else 401, "GatedRepo")
        content, start = repo.files[name], 0
        if wanted := self.headers["Range"]:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        self.hub.requests.append(Request(self.path, start, self.headers["Authorization"]))
        take = self.hub.faults and name.endswith(self.hub.faulty)
        fault = self.hub.faults.pop(0) if take else ""
        if fault == "503":
            return self._error(503, "Unavailable")
        body = content[start:]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "long":
            body += b"x"
        stop = int(fault.split()[0]) if fault[:1].isdigit() else len(body)
        self._answer(206 if start else 200, body, headers, stop)
        if stop < len(body):
            if "stall" in fault:
                time.sleep(60)
            self.close_connection = True

    def _error(self, status: int, code: str):
        self._answer(status, b"{}", {"X-Error-Code": code})

    def _answer(self, status: int, body: bytes, headers: dict | None = None, stop=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:stop])
            self.wfile.flush()
