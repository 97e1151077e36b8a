"""A model Hub on loopback for tests, of the standard library only.

It speaks what `huggingface_hub` asks for when it reads: model info, trees, and files with ETag, Range and the
redirect of large files to a second origin. Anything can be made to fail once or always, and every request is
kept. Writing to it goes through `Repository.commit`, which is what an upload over HTTP would call as well.
"""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote, unquote, urlsplit

LARGE = re.compile(r".*\.(safetensors|bin|gguf|onnx|pt|pth|h5|msgpack|model|parquet|zip)")
"""Names that are kept as large files (LFS) whatever their size, as a new repository's .gitattributes says."""


@dataclass(frozen=True)
class Blob:
    """The content of a file and how the Hub keeps it."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """The hash git gives what it stores: the content, or the pointer to a large file."""
        stored = self.content
        if self.large:
            stored = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(stored)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass
class Repository:
    """A model's history: trees by commit, and the commits that branches and tags mean."""

    name: str
    private: bool = False
    gated: bool = False
    trees: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], *, branch: str = "main", delete: Iterable[str] = ()) -> str:
        """Put files onto a branch, which is made from `main` where it is new; return the commit."""
        parent = self.refs.get(branch, self.refs.get("main", ""))
        tree = dict(self.trees.get(parent, {}))
        tree |= {path: Blob(content, LARGE.fullmatch(path) is not None) for path, content in files.items()}
        for path in delete:
            del tree[path]
        listing = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(tree.items()))
        sha = hashlib.sha1(f"{self.name} {parent}\n{listing}".encode()).hexdigest()
        self.trees[sha] = tree
        self.refs[branch] = sha
        return sha

    def commit_folder(self, folder: Path, more: Mapping[str, bytes] = MappingProxyType({})) -> str:
        """Put every file of a folder onto `main`; return the commit."""
        found = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        return self.commit({**found, **more})

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, tag, commit or the beginning of one; None where there is none."""
        if revision in self.refs:
            return self.refs[revision]
        found = [sha for sha in self.trees if len(revision) >= 7 and sha.startswith(revision)]
        return found[0] if len(found) == 1 else None


@dataclass
class Fault:
    """What goes wrong with requests of a method and path.

    Attributes:
        path: A pattern found anywhere in the path.
        method: A pattern for the whole method.
        status: Answered instead of the truth; None leaves the answer and spoils how it is sent.
        headers: Of that answer.
        body: Of that answer.
        keep: Bytes of the body after which the connection is cut.
        silent: Take the request and never answer.
        times: How many requests are hit.
    """

    path: str
    method: str = "GET|HEAD"
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    keep: int | None = None
    silent: bool = False
    times: int = 1_000_000

    def hits(self, method: str, path: str) -> bool:
        return self.times > 0 and bool(re.fullmatch(self.method, method) and re.search(self.path, path))


@dataclass(frozen=True)
class Seen:
    """A request that came in, and how it was answered; `sent` counts the bytes of the body."""

    origin: str
    method: str
    path: str
    headers: dict[str, str]
    status: int
    sent: int = 0


@dataclass
class Answer:
    """What is sent back."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @classmethod
    def of(cls, document: object, **headers: str) -> "Answer":
        return cls(200, {"Content-Type": "application/json", **headers}, json.dumps(document).encode())

    @classmethod
    def error(cls, status: int, message: str, code: str | None = None) -> "Answer":
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        return cls(status, headers, json.dumps({"error": message}).encode())

    def part(self, span: str | None) -> "Answer":
        """The bytes a Range header asks for; all of them without one."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", span or "")
        if found is None or self.status != 200:
            return self
        start, end = int(found[1]), min(int(found[2] or len(self.body) - 1), len(self.body) - 1)
        if start >= len(self.body):
            return Answer(416, {"Content-Range": f"bytes */{len(self.body)}"})
        where = {"Content-Range": f"bytes {start}-{end}/{len(self.body)}"}
        return Answer(206, self.headers | where, self.body[start : end + 1])


class Hub:
    """The server: `with Hub() as hub`, then `hub.url` is what HF_ENDPOINT is to be.

    Attributes:
        repositories: By name.
        tokens: Those it knows.
        granted: Those whose owner has accepted the terms of gated models.
        faults: The first that hits a request spoils it.
        seen: Every request, in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str] = set()
        self.granted: set[str] = set()
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.routes: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = [
            ("GET", re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?"), self._info),
            ("GET", re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)"), self._tree),
            ("GET|HEAD", re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)"), self._file),
        ]
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._servers = {name: _server(self, name) for name in ("hub", "storage")}
        self.url, self.storage = (f"http://127.0.0.1:{one.server_port}" for one in self._servers.values())

    def __enter__(self) -> "Hub":
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; requests that wait for an answer lose their connection."""
        self._closing.set()
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def create(self, name: str, *, private: bool = False, gated: bool = False) -> Repository:
        """A new, empty repository."""
        self.repositories[name] = Repository(name, private, gated)
        return self.repositories[name]

    def fetched(self, repository: str = "") -> set[str]:
        """Paths of the files of a repository (of all) that were asked for."""
        pattern = re.compile(rf"/{repository or '[^/]+/[^/]+'}/resolve/[^/]+/(.+)")
        return {unquote(found[1]) for seen in self.seen if (found := pattern.fullmatch(seen.path))}

    def sent(self, pattern: str) -> int:
        """Bytes of the bodies of all answers to requests whose path has this pattern in it."""
        return sum(seen.sent for seen in self.seen if re.search(pattern, seen.path))

    def answer(self, origin: str, request: BaseHTTPRequestHandler) -> None:
        """Find the answer to a request, spoil it if a fault says so, send it."""
        path = urlsplit(request.path).path
        with self._lock:
            fault = next((one for one in self.faults if one.hits(request.command, path)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.status is not None:
            answer = Answer(fault.status, fault.headers, fault.body)
        else:
            find = self._find if origin == "hub" else self._stored
            answer = find(request.command, path, request.headers.get("Authorization"))
            answer = answer.part(request.headers.get("Range") if request.command == "GET" else None)
        headers = {name.lower(): value for name, value in request.headers.items()}
        silent = fault is not None and fault.silent
        sent = 0 if silent or request.command == "HEAD" else len(answer.body[: fault.keep if fault else None])
        self.seen.append(Seen(origin, request.command, path, headers, answer.status, sent))
        if silent:
            self._closing.wait(60)
            request.close_connection = True
            return
        _send(request, answer, keep=fault.keep if fault else None)

    def _find(self, method: str, path: str, authorization: str | None) -> Answer:
        token = (authorization or "").removeprefix("Bearer ") or None
        if token is not None and token not in self.tokens:
            return Answer.error(401, "Invalid credentials in Authorization header")
        for methods, pattern, answer in self.routes:
            found = pattern.fullmatch(path)
            if found and re.fullmatch(methods, method):
                repository = self.repositories.get(found[1])
                if repository is None or (repository.private and token is None):
                    return _no_repository(token)
                return answer(repository, token, *(unquote(part or "main") for part in found.groups()[1:]))
        return Answer.error(404, "Sorry, we can't find the page you are looking for.")

    def _info(self, repository: Repository, token: str | None, revision: str) -> Answer:
        if (commit := repository.resolve(revision)) is None:
            return Answer.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = [_entry(path, blob, "rfilename") for path, blob in sorted(repository.trees[commit].items())]
        return Answer.of(
            {
                "id": repository.name,
                "modelId": repository.name,
                "sha": commit,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "tags": [],
                "siblings": files,
            }
        )

    def _tree(self, repository: Repository, token: str | None, revision: str) -> Answer:
        if (commit := repository.resolve(revision)) is None:
            return Answer.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        tree = sorted(repository.trees[commit].items())
        folders = sorted({str(parent) for path, _ in tree for parent in Path(path).parents} - {"."})
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders]
        return Answer.of([*entries, *(_entry(path, blob, "path") for path, blob in tree)])

    def _file(self, repository: Repository, token: str | None, revision: str, path: str) -> Answer:
        if repository.gated and token not in self.granted:
            message = f"Access to model {repository.name} is restricted."
            return Answer.error(401 if token is None else 403, message, "GatedRepo")
        if (commit := repository.resolve(revision)) is None:
            return Answer.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if (blob := repository.trees[commit].get(path)) is None:
            return Answer.error(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not blob.large:
            return Answer(200, {**headers, "ETag": f'"{blob.etag}"'}, blob.content)
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        place = f"{self.storage}/{repository.name}/{blob.sha256}?name={quote(path, safe='')}&signature=once"
        return Answer(302, {**headers, "Location": place})

    def _stored(self, method: str, path: str, authorization: str | None) -> Answer:
        name, _, sha256 = path.strip("/").rpartition("/")
        trees = self.repositories[name].trees.values() if name in self.repositories else ()
        found = [blob for tree in trees for blob in tree.values() if blob.large and blob.sha256 == sha256]
        if not found:
            return Answer(
                403, {"Content-Type": "application/xml"}, b"<Error><Code>AccessDenied</Code></Error>"
            )
        # Storage has an ETag of its own, which is not the Hub's.
        etag = hashlib.md5(found[0].content).hexdigest()
        return Answer(200, {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}, found[0].content)


def _no_repository(token: str | None) -> Answer:
    """What the Hub says of a repository that does not exist or must not be known."""
    if token is None:
        return Answer.error(401, "Invalid username or password.")
    return Answer.error(404, "Repository not found", "RepoNotFound")


def _entry(path: str, blob: Blob, key: str) -> dict[str, object]:
    """A file as model info ("rfilename") and trees ("path") list it."""
    entry: dict[str, object] = {key: path, "size": len(blob.content)}
    entry |= {"blobId": blob.oid} if key == "rfilename" else {"type": "file", "oid": blob.oid}
    if blob.large:
        large = {"size": len(blob.content), "pointerSize": 134}
        entry["lfs"] = large | {("sha256" if key == "rfilename" else "oid"): blob.sha256}
    return entry


def _send(request: BaseHTTPRequestHandler, answer: Answer, *, keep: int | None) -> None:
    request.send_response(answer.status)
    for name, value in answer.headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(answer.body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(answer.body[:keep])
    if keep is not None:
        request.wfile.flush()
        request.connection.shutdown(socket.SHUT_RDWR)
        request.close_connection = True


def _server(hub: Hub, origin: str) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            # Headers and body leave in two writes; held back for the first's receipt, each answer takes 40 ms.
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def answer(self) -> None:
            try:
                hub.answer(origin, self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 - the names http.server looks for

        def log_message(self, *values: object) -> None:
            """Nothing: tests read `seen`."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server
