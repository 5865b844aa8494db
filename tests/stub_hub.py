"""The part of the Hugging Face Hub that this program uses, on loopback."""

import base64
import contextlib
import functools
import hashlib
import http.server
import json
import re
import threading

MAIN = "main"


class Hub:
    """Repositories: for each, its commits in order, as files by name, and who may see it."""

    def __init__(self):
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.uploads: dict[str, bytes] = {}
        self.token = "hf_right"

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(
            repr((repo, len(self.commits[repo]), sorted(files))).encode()
        ).hexdigest()
        self.commits[repo].append((sha, files))
        return sha

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.commits[repo]
        if revision == MAIN:
            return commits[-1]
        return next((commit for commit in commits if commit[0] == revision), None)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args):
        self.hub = hub
        super().__init__(*args)

    def answer(self, status=200, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("length", str(len(body))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = ""):
        self.answer(status, {"error": code}, X_Error_Code=code)

    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def commit_of(self, repo: str, revision: str):
        """The commit, after having refused a request for one that does not exist."""
        if repo not in self.hub.commits or (repo in self.hub.private and not self.authorized()):
            return self.refuse(401, "RepoNotFound")
        found = self.hub.find(repo, revision)
        return found or self.refuse(404, "RevisionNotFound")

    def do_GET(self):
        self.hub.requests.append((self.command, self.path))
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            repo, revision = match[1], match[2] or MAIN
            if found := self.commit_of(repo, revision):
                sha, files = found
                siblings = [{"rfilename": name} for name in files]
                private = repo in self.hub.private
                self.answer(
                    content={"id": repo, "sha": sha, "private": private, "siblings": siblings}
                )
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if found := self.commit_of(match[1], match[2]):
                sha, files = found
                if match[3] not in files:
                    return self.refuse(404, "EntryNotFound")
                content = files[match[3]]
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self.answer(content=content, ETag=etag, X_Repo_Commit=sha)
        else:
            self.refuse(404)

    do_HEAD = do_GET

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self):
        self.hub.uploads[self.path.rpartition("/")[2]] = self.body()
        self.answer()

    def do_POST(self):
        self.hub.requests.append((self.command, self.path))
        body, path = self.body(), self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self.answer(content={"errors": [], "warnings": []})
        if not self.authorized():
            return self.refuse(401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.hub.commits[repo] = []
            self.hub.commit(repo, {".gitattributes": b""})
            if asked.get("visibility") == "private" or asked.get("private"):
                self.hub.private.add(repo)
            self.answer(content={"url": f"{self.url()}/{repo}"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            if self.commit_of(match[1], match[2]):
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = [
                    {
                        "path": name,
                        "uploadMode": "lfs" if name.endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for name in names
                ]
                self.answer(content={"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                asked | {"actions": {"upload": {"href": f"{self.url()}/lfs/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            self.answer(content={"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            if found := self.commit_of(match[1], match[2]):
                sha = self.hub.commit(match[1], self.changed(found[1], body))
                url = f"{self.url()}/{match[1]}/commit/{sha}"
                self.answer(content={"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})
        else:
            self.refuse(404)

    def changed(self, files: dict[str, bytes], body: bytes) -> dict[str, bytes]:
        files = dict(files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return files

    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve():
    """Yields a `Hub` with its `url`."""
    hub = Hub()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, hub)
    ) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
