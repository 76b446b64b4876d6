"""A test double of Google Cloud Storage: as much of its JSON API, over objects in memory, as our libraries ask for."""

import contextlib
import dataclasses
import datetime
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUCKET = r"/storage/v1/b/(?P<bucket>[^/]+)"
ROUTES = [
    ("GET", BUCKET, "about"),
    ("GET", BUCKET + "/o", "names"),
    ("GET", f"(/download)?{BUCKET}/o/(?P<name>[^/]+)", "read"),
    ("DELETE", BUCKET + "/o/(?P<name>[^/]+)", "delete"),
    ("POST", f"/upload{BUCKET}/o", "upload"),
    ("(PUT|POST)", "/session/(?P<number>[0-9]+)", "proceed"),
    ("POST", BUCKET + "/o/(?P<name>[^/]+)/(rewriteTo|copyTo)/b/[^/]+/o/(?P<target>[^/]+)", "copy"),
    ("POST", BUCKET + "/o/(?P<name>[^/]+)/moveTo/o/(?P<target>[^/]+)", "move"),
]


@dataclasses.dataclass(frozen=True)
class Object:
    """One version of an object."""

    data: bytes
    generation: int
    updated: str


@dataclasses.dataclass
class Answer:
    """What a request is answered with: bytes, or what becomes JSON."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Request:
    """What was asked, apart from the object that it is about."""

    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


class Refused(Exception):
    """A request that is answered with an error: (status, message)."""


class Bucket:
    """One bucket; every public method below `answer` answers one kind of request."""

    def __init__(self, name: str):
        self.name, self.url = name, ""
        self.objects: dict[str, Object] = {}
        self.sessions: list[tuple[Request, str, bytearray]] = []  # uploads in parts
        self.generation = 0
        self.requests: list[str] = []  # "METHOD /path" and the name of what is uploaded, percent-encoding undone
        self.refusal: tuple[str, int, str] | None = None  # what is asked (a pattern), status, message
        self.lock = threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """What sends a process's clients here: gcsfs, google-cloud-storage and tensorstore."""
        quiet = {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "NO_GCE_CHECK": "true"}
        return {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url, **quiet}

    def save(self, prefix: str, folder: Path) -> None:
        """Writes the objects below `prefix` into `folder`."""
        for name, found in list(self.objects.items()):
            if name.startswith(prefix) and not name.endswith("/"):
                path = folder / name.removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(found.data)

    def load(self, folder: Path, prefix: str) -> None:
        """Takes in the files of `folder`."""
        for path in folder.rglob("*"):
            if path.is_file():
                self._put(f"{prefix}{path.relative_to(folder)}", path.read_bytes(), None)

    def answer(self, method: str, path: str, request: Request) -> Answer:
        """Answers one request."""
        asked = f"{method} {urllib.parse.unquote(path)} {request.query.get('name', '')}".rstrip()
        self.requests.append(asked)
        for verb, route, name in ROUTES:
            match = re.fullmatch(route, path)
            if match and re.fullmatch(verb, method):
                parts = {key: urllib.parse.unquote(part) for key, part in match.groupdict().items()}
                with self.lock:
                    try:
                        if self.refusal and re.match(self.refusal[0], asked):
                            raise Refused(*self.refusal[1:])
                        if parts.pop("bucket", self.name) != self.name:
                            raise Refused(404, "The specified bucket does not exist.")
                        return getattr(self, name)(request, **parts)
                    except Refused as error:
                        status, message = error.args
                        return Answer({"error": {"code": status, "message": message}}, status)
        return Answer({"error": {"code": 501, "message": "this double cannot do that"}}, 501)

    def about(self, _: Request) -> Answer:
        """The bucket itself."""
        return Answer({"kind": "storage#bucket", "name": self.name, "id": self.name})

    def names(self, request: Request) -> Answer:
        """A page of the list of objects, and of what stands before the next delimiter in their names."""
        ask = request.query.get
        prefix, delimiter, end = ask("prefix", ""), ask("delimiter"), ask("endOffset")
        found: dict[str, bool] = {}  # and whether it is an object
        for name in sorted(self.objects):
            if name.startswith(prefix) and name >= ask("startOffset", "") and (not end or name < end):
                inner, cut, _ = name.removeprefix(prefix).partition(delimiter) if delimiter else (name, "", "")
                found.setdefault(prefix + inner + cut if cut else name, not cut)
        left = [name for name in found if name > ask("pageToken", "")]
        page = left[: int(ask("maxResults", 1000))]
        items = [self._facts(name) for name in page if found[name]]
        more = {"nextPageToken": page[-1]} if len(page) < len(left) else {}
        prefixes = [name for name in page if not found[name]]
        return Answer({"kind": "storage#objects", "items": items, "prefixes": prefixes, **more})

    def read(self, request: Request, name: str) -> Answer:
        """An object's facts or, with alt=media, its content or a range of it."""
        found = self._checked(name, request, 304)
        if request.query.get("alt") != "media":
            return Answer(self._facts(name))
        size, headers = len(found.data), {"x-goog-generation": str(found.generation)}
        headers["x-goog-stored-content-length"] = str(size)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
        if not wanted:
            return Answer(found.data, 200, headers)
        first, last = wanted[1], wanted[2]
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= size:
            raise Refused(416, "The requested range cannot be satisfied.")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Answer(found.data[start:stop], 206, headers)

    def delete(self, request: Request, name: str) -> Answer:
        """Removes an object."""
        self._checked(name, request, 412)
        del self.objects[name]
        return Answer(status=204)

    def upload(self, request: Request) -> Answer:
        """A new object: its content alone, behind its facts, or to come in parts."""
        kind, name = request.query.get("uploadType"), request.query.get("name")
        if kind == "media":
            return self._put(name, request.body, request)
        if kind == "multipart":
            mark = re.search('boundary="?([^";]+)', request.headers["content-type"])[1].encode()
            facts, content = request.body.split(b"--" + mark)[1:3]
            facts, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (facts, content))
            content = content[:-2] if content.endswith(b"\r\n") else content.removesuffix(b"\n")
            return self._put(name or json.loads(facts)["name"], content, request)
        self.sessions.append((request, name or json.loads(request.body)["name"], bytearray()))
        return Answer({}, 200, {"Location": f"{self.url}/session/{len(self.sessions) - 1}"})

    def proceed(self, request: Request, number: str) -> Answer:
        """A part of an upload; the one that names the whole length is the last."""
        begun, name, content = self.sessions[int(number)]
        content += request.body
        if request.headers["content-range"].endswith("/*"):
            return Answer(b"", 308, {"Range": f"bytes=0-{len(content) - 1}"})
        return self._put(name, bytes(content), begun)

    def copy(self, request: Request, name: str, target: str) -> Answer:
        """Writes an object's content under another name."""
        content = self._checked(name, None, 412).data
        facts = self._put(target, content, request).body
        return Answer({"kind": "storage#rewriteResponse", "done": True, "resource": facts, **facts})

    def move(self, request: Request, name: str, target: str) -> Answer:
        """Gives an object another name."""
        facts = self.copy(request, name, target).body["resource"]
        del self.objects[name]
        return Answer(facts)

    def _put(self, name: str, content: bytes, request: Request | None) -> Answer:
        self._checked(name, request, 412, may_lack=True)
        self.generation += 1
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self.objects[name] = Object(content, self.generation, now)
        return Answer(self._facts(name))

    def _checked(self, name: str, request: Request | None, unchanged: int, may_lack: bool = False) -> Object | None:
        """The object, if it is there (or may lack) and the request's conditions hold."""
        found = self.objects.get(name)
        if found is None and not may_lack:
            raise Refused(404, f"No such object: {self.name}/{name}")
        query, now = request.query if request else {}, str(found.generation if found else 0)
        if query.get("ifGenerationMatch", now) != now:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if query.get("ifGenerationNotMatch") == now:
            raise Refused(unchanged, "")
        return found

    def _facts(self, name: str) -> dict[str, Any]:
        found = self.objects[name]
        facts = {"kind": "storage#object", "bucket": self.name, "name": name, "size": str(len(found.data))}
        times = {"timeCreated": found.updated, "updated": found.updated}
        return {**facts, **times, "generation": str(found.generation), "metageneration": "1"}


@contextlib.contextmanager
def serve(name: str = "bucket") -> Iterator[Bucket]:
    """A bucket that processes with its `environment` find on this machine."""
    bucket = Bucket(name)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # which keeps connections
        wbufsize = -1  # an answer in one packet: in two, the second waits for the first's receipt

        def handle_any(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {key.lower(): value for key, value in self.headers.items()}
            request = Request(dict(urllib.parse.parse_qsl(url.query)), headers, body)
            answer = bucket.answer(self.command, url.path, request)
            content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            content = b"" if answer.status in (204, 304) else content
            self.send_response(answer.status)
            for key, value in {"Content-Length": str(len(content)), **answer.headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = handle_any

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # of connections that wait; others are put off for seconds

        def handle_error(self, *_: object) -> None:
            """Says nothing: clients are killed."""

    with Server(("127.0.0.1", 0), Handler) as server:
        bucket.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield bucket
        finally:
            server.shutdown()
