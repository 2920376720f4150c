"""A small server that speaks the Hugging Face hub's protocol on 127.0.0.1, for the real client code."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repository:
    """A repository: its commits, and what its branches point at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit to main; its id."""
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[name] = files
        self.branches["main"] = name
        return name


@dataclass
class Hub:
    """Repositories by kind (models, datasets) and name, and a log of what was asked."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    breaks: int = 0  # so many transfers of more than `break_after` bytes break off there
    break_after: int = 11_000_000
    endpoint: str = ""
    token: str = "hf_write"  # who writes must show it
    tampered: dict[str, bytes] = field(default_factory=dict)  # served instead of what the commit has, by path
    large: dict[str, bytes] = field(default_factory=dict)  # what was uploaded by its sha256

    def repository(self, kind: str, name: str) -> Repository:
        """The repository of this kind and name, made where there is none."""
        return self.repositories.setdefault((kind, name), Repository())


@contextmanager
def serve():
    """A running `Hub`."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def do_POST(self):
            self.answer(self.body())

        def do_PUT(self):
            self.answer(self.body())

        def body(self):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def answer(self, body=b""):
            url = urlsplit(self.path)
            path = unquote(url.path)
            hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
            if path == "/api/validate-yaml":
                return self.json({"errors": [], "warnings": []})
            writing = re.search(r"^/api/repos/create$|/(preupload|commit)/|/info/lfs/", path)
            if writing and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.refuse(401, "")
            if path == "/api/repos/create":
                return self.create(json.loads(body))
            if found := re.fullmatch(r"/([^/]+/[^/]+)[.]git/info/lfs/objects/batch", path):
                return self.batch(json.loads(body)["objects"])
            if found := re.fullmatch(r"/large/([0-9a-f]{64})", path):
                hub.large[found[1]] = body
                return self.json({})
            if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\S+))?", path):
                return self.api(*found.groups(), body, parse_qs(url.query))
            if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                kind = "datasets" if found[1] else "models"
                return self.file(kind, found[2], found[3], found[4])
            return self.refuse(404, "EntryNotFound")

        def create(self, asked):
            name = f"{asked['organization']}/{asked['name']}"
            address = {"url": f"{hub.endpoint}/{name}"}
            if ("models", name) in hub.repositories:
                return self.json(address, 409)
            made = hub.repository("models", name)
            made.private = asked.get("visibility") == "private"
            made.commit({".gitattributes": b""})
            return self.json(address)

        def batch(self, objects):
            """Where to put large files: https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md."""
            missing = [each for each in objects if each["oid"] not in hub.large]
            for each in missing:
                each["actions"] = {"upload": {"href": f"{hub.endpoint}/large/{each['oid']}"}}
            return self.json({"transfer": "basic", "objects": objects})

        def commit(self, name, repository, lines):
            files = dict(repository.commits[repository.branches["main"]])
            for operation in map(json.loads, lines.splitlines()):
                what, value = operation["key"], operation["value"]
                if what == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif what == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
                elif what == "deletedFile":
                    del files[value["path"]]
            made = repository.commit(files)
            return self.json({"commitUrl": f"{hub.endpoint}/{name}/commit/{made}", "commitOid": made})

        def api(self, kind, name, rest, body, query):
            repository = hub.repositories.get((kind, name))
            if repository is None:
                return self.refuse(401, "RepoNotFound")
            action, _, tail = (rest or "revision/main").partition("/")
            revision, _, folder = tail.partition("/")
            commit = repository.branches.get(revision, revision)
            if commit not in repository.commits:
                return self.refuse(404, "RevisionNotFound")
            files = repository.commits[commit]
            if action == "revision":
                siblings = [{"rfilename": file} for file in files]
                gated = "manual" if repository.gated else False
                return self.json({"id": name, "sha": commit, "siblings": siblings, "private": False, "gated": gated})
            if action == "preupload":
                modes = {True: "lfs", False: "regular"}
                asked = [each["path"] for each in json.loads(body)["files"]]
                answers = [{"path": each, "uploadMode": modes[each.endswith(".safetensors")]} for each in asked]
                return self.json({"files": [each | {"shouldIgnore": False} for each in answers]})
            if action == "commit":
                return self.commit(name, repository, body)
            entries = [self.entry(file, content) for file, content in files.items()]
            if action == "paths-info":
                asked = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
                return self.json([entry for entry in entries if entry["path"] in asked])
            if action == "tree":
                inside = [entry for entry in entries if entry["path"].startswith(folder)]
                if query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
                    top = {entry["path"][len(folder) :].strip("/").split("/")[0] for entry in inside}
                    prefix = f"{folder}/" if folder else ""
                    folders = [{"type": "directory", "path": prefix + name, "size": 0, "oid": "0" * 40} for name in top]
                    known = {entry["path"] for entry in inside}
                    inside = [entry for entry in inside if entry["path"][len(prefix) :] in top]
                    inside += [entry for entry in folders if entry["path"] not in known]
                return self.json(inside)
            return self.refuse(404, "EntryNotFound")

        def entry(self, path, content):
            found = {"type": "file", "path": path, "size": len(content)}
            found["oid"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()  # git's
            if path.endswith(".safetensors"):
                found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            return found

        def file(self, kind, name, revision, path):
            repository = hub.repositories.get((kind, name))
            if repository is None:
                return self.refuse(401, "RepoNotFound")
            if repository.gated:
                return self.refuse(403, "GatedRepo")
            commit = repository.branches.get(revision, revision)
            if commit not in repository.commits:
                return self.refuse(404, "RevisionNotFound")
            content = hub.tampered.get(path, repository.commits[commit].get(path))
            if content is None:
                return self.refuse(404, "EntryNotFound")
            first, status = 0, 200
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, status = int(asked[1]), 206
            part = content[first:]
            self.send_response(status)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "HEAD":
                return None
            if hub.breaks and len(part) > hub.break_after:
                hub.breaks -= 1
                self.wfile.write(part[: hub.break_after])
                self.wfile.flush()
                self.close_connection = True
                return None
            self.wfile.write(part)
            return None

        def json(self, value, status=200):
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def refuse(self, status, code):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
