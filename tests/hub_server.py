"""A Hugging Face hub on loopback: repos, branches, commits, LFS, and what it was asked."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test0123456789secret"
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_API = rf"/api/models/{_REPO}"


class Repo:
    """Commits, each a whole tree of path -> bytes, and the names that stand for some of them."""

    def __init__(self, visibility=None):
        self.visibility, self.gated = visibility, False
        self.trees, self.messages, self.refs, self.lfs = {}, {}, {}, set()
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def commit(self, branch, files, message):
        before = self.refs.get(branch)
        tree = {**self.trees.get(before, {}), **files}
        oid = hashlib.sha1(repr((before, message, sorted(tree.items()))).encode()).hexdigest()
        self.trees[oid], self.messages[oid], self.refs[branch] = tree, message, oid
        return oid

    def resolve(self, revision):
        oid = self.refs.get(revision, revision)
        return oid if oid in self.trees else None

    def etag(self, path, data):
        if path in self.lfs:
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def head(self):
        return self.trees[self.refs["main"]]


class Server(ThreadingHTTPServer):
    """``faults`` maps (method, part of a path) to the (status, headers) that it is answered."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.objects, self.faults = {}, {}, {}
        self.user, self.seen, self.lock = "user", [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def asked(self, method, part=""):
        return [path for m, path, _, _ in self.seen if m == method and part in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10

    def _serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        server = self.server
        with server.lock:
            server.seen.append((self.command, self.path, dict(self.headers), body))
            for (method, part), (status, headers) in server.faults.items():
                if method == self.command and part in path:
                    return self._answer(status, b"{}", headers)
            for (method, pattern), answer in _ROUTES.items():
                found = re.fullmatch(pattern, path)
                if method == self.command and found:
                    named = {key: unquote(value) for key, value in found.groupdict().items()}
                    return answer(self, body, **named)
        return self._error(404, "NoSuchRoute")

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 - http.server names them

    def log_message(self, *_args):
        pass

    def _answer(self, status, raw=b"", headers=()):
        raw = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **dict(headers)}.items():
            self.send_header(name, value)
        with suppress(ConnectionError):
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(raw)

    def _error(self, status, code, message=""):
        self._answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def _login(self):
        """Who asks: None without a token, False with one that is not known."""
        given = self.headers.get("Authorization")
        if given is None:
            return None
        return given == f"Bearer {TOKEN}"

    def _readable(self, name):
        """The repo, or None once it has been answered why not."""
        repo, login = self.server.repos.get(name), self._login()
        if login is False:
            message = "Invalid credentials in Authorization header"
            return self._answer(401, {"error": message}, {"X-Error-Message": message})
        if repo is None or (repo.visibility == "private" and not login):
            return self._error(404 if login else 401, "RepoNotFound", "Repository not found")
        if repo.gated:
            return self._error(403 if login else 401, "GatedRepo", "Access is restricted")
        return repo

    def _writable(self, name):
        repo = self._readable(name)
        if repo is None:
            return None
        if not self._login() or name.split("/")[0] != self.server.user:
            return self._error(403, "", "Forbidden: pass `create_pr=1` as a query parameter")
        return repo

    def _at(self, name, revision, repo=None):
        """Repo and commit, or None once answered."""
        repo = repo or self._readable(name)
        if repo is None:
            return None
        oid = repo.resolve(revision)
        if oid is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, oid

    def _file(self, body, repo, revision, path):
        found = self._at(repo, revision)
        if found is None:
            return
        repo, oid = found
        commit = {"X-Repo-Commit": oid}
        if path not in repo.trees[oid]:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._answer(404, b"", {**headers, **commit})
        data = repo.trees[oid][path]
        etag = f'"{repo.etag(path, data)}"'
        if path in repo.lfs:  # its content lies elsewhere, where no token goes
            name = hashlib.sha256(data).hexdigest()
            linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data))}
            location = {"Location": f"{self.server.cdn}/objects/{name}"}
            return self._answer(302, b"", {**commit, **linked, **location})
        self._answer(200, data, {**commit, "ETag": etag})

    def _create(self, body):
        asked = json.loads(body)
        owner = asked["organization"] or self.server.user
        name = f"{owner}/{asked['name']}"
        url = {"url": f"{self.server.url}/{name}", "name": name}
        if not self._login():
            return self._error(401, "", "Invalid username or password.")
        if owner != self.server.user:
            return self._error(403, "", f"You don't have the rights to create under {owner}")
        if name in self.server.repos:
            return self._answer(409, {"error": "You already created this model repo", **url})
        self.server.repos[name] = Repo(asked.get("visibility"))
        self._answer(200, url)

    def _branch(self, body, repo, branch):
        repo = self._writable(repo)
        if repo is None:
            return
        if branch in repo.refs:
            return self._error(409, "", "Reference already exists")
        repo.refs[branch] = repo.refs["main"]
        self._answer(201, {})

    def _info(self, body, repo, revision="main"):
        found = self._at(repo, revision)
        if found:
            self._answer(200, {"id": repo, "sha": found[1], "siblings": [], "tags": []})

    def _tree(self, body, repo, revision):
        found = self._at(repo, revision)
        if found:
            files = found[0].trees[found[1]].items()
            entries = [
                {"type": "file", "path": p, "size": len(d), "oid": found[0].etag(p, d)}
                for p, d in files
            ]
            self._answer(200, entries)

    def _preupload(self, body, repo, revision):
        repo = self._writable(repo)
        if repo is None or self._at(None, revision, repo) is None:
            return
        tree = repo.trees[repo.resolve(revision)]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": repo.etag(file["path"], tree[file["path"]])
                if file["path"] in tree
                else None,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": modes})

    def _batch(self, body, repo):
        if self._writable(repo) is None:
            return
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.server.cdn}/objects/{asked['oid']}"}}
            stored = asked["oid"] in self.server.objects
            objects.append({**asked, **({} if stored else {"actions": upload})})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "", "Wrong content")
        self.server.objects[oid] = body
        self._answer(200)

    def _object(self, body, oid):
        self._answer(200, self.server.objects[oid])

    def _commit(self, body, repo, revision):
        name, repo = repo, self._writable(repo)
        if repo is None or self._at(None, revision, repo) is None:
            return
        header, *lines = map(json.loads, body.splitlines())
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
                repo.lfs.add(value["path"])
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        oid = repo.commit(revision, files, header["value"]["summary"])
        url = f"{self.server.url}/{name}/commit/{oid}"
        self._answer(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def _yaml(self, body):
        content = json.loads(body)["content"]
        good = re.match(r"---\nlibrary_name: mpsae\ntags:\n(- [a-z-]+\n)+---\n", content)
        self._answer(200 if good else 400, {"errors": [] if good else [{"message": "bad YAML"}]})


_ROUTES = {
    ("POST", "/api/repos/create"): _Handler._create,
    ("POST", "/api/validate-yaml"): _Handler._yaml,
    ("POST", rf"{_API}/branch/(?P<branch>.+)"): _Handler._branch,
    ("GET", rf"{_API}/tree/(?P<revision>.+)"): _Handler._tree,
    ("GET", rf"{_API}/revision/(?P<revision>.+)"): _Handler._info,
    ("GET", _API): _Handler._info,
    ("POST", rf"{_API}/preupload/(?P<revision>.+)"): _Handler._preupload,
    ("POST", rf"{_API}/commit/(?P<revision>.+)"): _Handler._commit,
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch"): _Handler._batch,
    ("PUT", r"/objects/(?P<oid>\w+)"): _Handler._put,
    ("GET", r"/objects/(?P<oid>\w+)"): _Handler._object,
    **{
        (method, rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"): _Handler._file
        for method in ("GET", "HEAD")
    },
}


@contextmanager
def serving():
    """A hub, and a server of another origin that has the contents of its large files."""
    servers = [Server(), Server()]
    hub, store = servers
    hub.cdn, hub.store, store.objects = store.url, store, hub.objects
    threads = [
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        for server in servers
    ]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join(10)
            server.server_close()
