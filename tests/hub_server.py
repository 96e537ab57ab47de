"""A small Hugging Face Hub on loopback, in memory: what the real client asks of the real Hub, and failures on request.

    hub = HubServer()                      # listens at once; HF_ENDPOINT=hub.url, before huggingface_hub is imported
    hub.add_user("alice", "hf_secret")
    hub.fail("POST", "/commit/", applied=True, drop=True)      # the next commit is made, its answer lost
    hub.repo("alice/tiny").files("main")   # {path: bytes}

Written from the behaviour of huggingface_hub 2.4. Large files travel as Git LFS objects under a second host name, as on
the real Hub, so that a token sent there would be seen. Xet is not spoken (HF_HUB_DISABLE_XET=1).
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".pt")
DATE = "2026-01-01T00:00:00.000Z"
ANY_ORIGIN = {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": "X-Error-Code, X-Repo-Commit"}


class Answer(Exception):
    """An error answer, raised from anywhere below a route."""

    def __init__(self, status: int, error: str, code: str = ""):
        super().__init__(error)
        self.status, self.body = status, {"error": error}
        self.headers = {"X-Error-Message": error, **({"X-Error-Code": code} if code else {})}


@dataclass
class File:
    data: bytes
    lfs: bool

    @property
    def blob_id(self) -> str:  # git's own hash of a file
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    description: str
    tree: dict[str, File]


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)  # a Space's sdk, hardware, variables and secrets

    def commit(self, tree: dict[str, File], title: str, branch: str = "main", description: str = "") -> Commit:
        parent = self.branches.get(branch)
        sha = os.urandom(20).hex()
        self.commits[sha] = Commit(sha, parent, title, description, tree)
        self.branches[branch] = sha
        return self.commits[sha]

    def put(self, files: dict[str, bytes], title: str = "by hand", branch: str = "main") -> Commit:
        """What a person commits on the website; the files that were there stay."""
        old = self.at(branch).tree if branch in self.branches else {}
        new = {path: File(data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()}
        return self.commit({**old, **new}, title, branch)

    def at(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.data for path, file in self.at(revision).tree.items()}

    def log(self, revision: str = "main") -> list[Commit]:
        """The commits that lead to a revision, newest first."""
        commit, found = self.at(revision), []
        while True:
            found.append(commit)
            if commit.parent is None:
                return found
            commit = self.commits[commit.parent]

    def titles(self, revision: str = "main") -> list[str]:
        return [commit.title for commit in self.log(revision)]


@dataclass
class User:
    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"
    org_role: str = "write"  # in all of its organisations


@dataclass
class Fault:
    method: str
    path: str  # a part of the path
    times: int
    status: int
    headers: dict[str, str]
    drop: bool  # close the connection instead of answering
    hang: float  # seconds before anything else
    applied: bool  # do what was asked, then fail


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    user: User | None
    host: str  # the second host name is the CDN's

    def json(self) -> dict:
        return json.loads(self.body or b"{}")


Response = tuple[int, dict[str, str], bytes]
ROUTES: list[tuple[str, re.Pattern, Callable]] = []
REPO = r"/api/(?P<kind>models|spaces|datasets)/(?P<repo_id>[^/]+/[^/]+)"


def route(method: str, pattern: str):
    def add(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return add


def answer(data, status: int = 200, headers: dict | None = None) -> Response:
    return status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(data).encode()


class HubServer:
    """The server and everything it holds; its state may be read and set from the test's own thread."""

    def __init__(self):
        self.lock = threading.RLock()
        self.reset()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url, self.cdn = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def reset(self) -> None:
        """Forgets users, repos, failures and requests."""
        self.users: dict[str, User] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.corrupt: set[str] = set()  # paths of which a byte flips on the way
        self.jobs: list[dict] = []  # as they were asked for, newest last
        self.renamed: dict[str, str] = {}  # old name of a repo -> the name that it has now

    def add_user(self, name: str, token: str, orgs: tuple[str, ...] = (), role: str = "write") -> User:
        self.users[token] = User(name, orgs, role)
        return self.users[token]

    def add_repo(self, repo_id: str, files: dict[str, bytes], kind: str = "models", **about) -> Repo:
        repo = self.repos[kind, repo_id] = Repo(repo_id, **about)
        repo.commit({}, "initial commit")
        repo.put(files)
        return repo

    def repo(self, repo_id: str, kind: str = "models") -> Repo:
        return self.repos[kind, repo_id]

    def fail(self, method: str, path: str, *, status: int = 500, times: int = 1, headers: dict | None = None,
             drop: bool = False, hang: float = 0.0, applied: bool = False) -> None:  # fmt: skip
        """The next `times` requests of a method whose path holds `path` fail."""
        self.faults.append(Fault(method, path, times, status, headers or {}, drop, hang, applied))

    def asked(self, method: str, path: str) -> list[Request]:
        return [r for r in list(self.requests) if r.method == method and path in r.path]

    def fault_for(self, request: Request) -> Fault | None:
        for fault in self.faults:
            if fault.method == request.method and fault.path in request.path and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def find(self, request: Request, kind: str, repo_id: str, write: bool = False) -> Repo:
        """The repo, if this user may know of it (and write to it)."""
        repo_id = self.renamed.get(repo_id, repo_id)
        repo = self.repos.get((kind, repo_id))
        mine = request.user is not None and repo_id.split("/")[0] in (request.user.name, *request.user.orgs)
        if repo is None or (repo.private and not mine):
            raise Answer(404 if request.user else 401, "Repository not found", "RepoNotFound")
        if write and not (mine and request.user.role == "write"):
            raise Answer(403, "You don't have the rights to write to this repo")
        return repo

    def dispatch(self, request: Request) -> Response:
        for method, pattern, function in ROUTES:
            found = pattern.fullmatch(request.path)
            if found and method == request.method.replace("HEAD", "GET"):
                with self.lock:
                    return function(self, request, **{k: v and unquote(v) for k, v in found.groupdict().items()})
        raise Answer(404, f"no route for {request.method} {request.path}")


# --- who, and which repos there are -----------------------------------------------------------------------------------
@route("GET", "/api/whoami-v2")
def whoami(hub: HubServer, request: Request) -> Response:
    if request.user is None:
        raise Answer(401, "Invalid credentials in Authorization header")
    user = request.user
    orgs = [{"name": org, "roleInOrg": user.org_role} for org in user.orgs]
    return answer({"type": "user", "name": user.name, "orgs": orgs, "auth": {"accessToken": {"role": user.role}}})


@route("POST", "/api/repos/create")
def create_repo(hub: HubServer, request: Request) -> Response:
    asked = request.json()
    if request.user is None or request.user.role != "write":
        raise Answer(403, "You don't have the rights to create a repo")
    owner = asked.get("organization") or request.user.name
    if owner not in (request.user.name, *request.user.orgs):
        raise Answer(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    kind, repo_id = asked.get("type", "model") + "s", f"{owner}/{asked['name']}"
    url = f"{hub.url}/{'spaces/' if kind == 'spaces' else ''}{repo_id}"
    if (kind, repo_id) in hub.repos:
        return answer({"error": "You already created this repo", "url": url}, 409)
    settings = {"sdk": asked.get("sdk"), "hardware": asked.get("hardware"), "secrets": {}, "variables": {}}
    for name in ("secrets", "variables"):
        settings[name] = {item["key"]: item["value"] for item in asked.get(name, ())}
    repo = Repo(repo_id, private=asked.get("visibility") == "private", settings=settings)
    repo.commit({".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
    hub.repos[kind, repo_id] = repo
    return answer({"url": url, "name": repo_id, "id": repo_id})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubServer, request: Request) -> Response:
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---", request.json()["content"], re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
        problem = "" if isinstance(data, dict) else "the metadata is not a mapping"
    except yaml.YAMLError as error:
        problem = str(error)
    errors = [{"message": problem}] if problem else []
    return answer({"errors": errors, "warnings": []}, 400 if problem else 200)


@route("GET", REPO + "/auth-check(?P<write>/write)?")
def auth_check(hub: HubServer, request: Request, kind: str, repo_id: str, write: str | None) -> Response:
    hub.find(request, kind, repo_id, write=bool(write))
    return answer({})


@route("GET", REPO + "(/revision/(?P<revision>[^/]+))?")
def info(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str | None) -> Response:
    repo = hub.find(request, kind, repo_id)
    commit = repo.at(revision or "main")
    siblings = [{"rfilename": path} for path in commit.tree]
    if "blobs" in request.query:
        for entry, file in zip(siblings, commit.tree.values(), strict=True):
            entry.update(size=len(file.data), blobId=file.blob_id)
            if file.lfs:
                entry["lfs"] = {"sha256": file.sha256, "size": len(file.data), "pointerSize": 130}
    return answer({"id": repo.id, "sha": commit.sha, "private": repo.private, "gated": repo.gated, "tags": [],
                   "siblings": siblings, "author": repo_id.split("/")[0], "downloads": 0, "likes": 0})  # fmt: skip


def describe(path: str, file: File) -> dict:
    entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.blob_id}
    return {**entry, "lfs": {"oid": file.sha256, "size": len(file.data), "pointerSize": 130}} if file.lfs else entry


@route("GET", REPO + "/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
def tree(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str, folder: str | None) -> Response:
    files = hub.find(request, kind, repo_id).at(revision).tree
    found = [describe(path, file) for path, file in files.items() if not folder or path.startswith(f"{folder}/")]
    if folder and not found:
        raise Answer(404, f"{folder} does not exist", "EntryNotFound")
    return answer(found)


@route("GET", REPO + "/refs")
def refs(hub: HubServer, request: Request, kind: str, repo_id: str) -> Response:
    repo = hub.find(request, kind, repo_id)
    named = {
        what: [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": sha} for name, sha in table.items()]
        for what, folder, table in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
    }
    return answer({**named, "converts": []})


@route("GET", REPO + "/commits/(?P<revision>[^/]+)")
def commits(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    log = hub.find(request, kind, repo_id).log(revision)
    return answer([
        {"id": c.sha, "title": c.title, "message": c.description, "date": DATE, "authors": [{"user": "someone"}]}
        for c in log
    ])  # fmt: skip


# --- writing ----------------------------------------------------------------------------------------------------------
@route("POST", REPO + "/preupload/(?P<revision>[^/]+)")
def preupload(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    old = hub.find(request, kind, repo_id, write="create_pr" not in request.query).at(revision).tree
    files = []
    for asked in request.json()["files"]:
        path = asked["path"]
        mode = "lfs" if path.endswith(LFS_SUFFIXES) or asked["size"] > 10_000_000 else "regular"
        oid = old[path].etag if path in old else None
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return answer({"files": files})


@route("POST", r"(?P<kind>/spaces)?/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
def lfs_batch(hub: HubServer, request: Request, kind: str | None, repo_id: str) -> Response:
    hub.find(request, "spaces" if kind else "models", repo_id)  # also for a pull request to somebody else's
    objects = []
    for asked in request.json()["objects"]:
        entry = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in hub.lfs:
            entry["actions"] = {
                "upload": {"href": f"{hub.cdn}/lfs/{asked['oid']}"},
                "verify": {"href": f"{hub.url}/lfs-verify"},
            }
        objects.append(entry)
    return answer({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_put(hub: HubServer, request: Request, oid: str) -> Response:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Answer(400, "the bytes are not those of their sha256")
    hub.lfs[oid] = request.body
    return answer({})


@route("POST", "/lfs-verify")
def lfs_verify(hub: HubServer, request: Request) -> Response:
    asked = request.json()
    if len(hub.lfs.get(asked["oid"], b"")) != asked["size"]:
        raise Answer(404, "no such object, or of another size")
    return answer({})


def apply(hub: HubServer, tree: dict[str, File], key: str, value: dict) -> None:
    path = value["path"]
    if key == "file":
        tree[path] = File(base64.b64decode(value["content"]), lfs=False)
    elif key == "lfsFile":
        if value["oid"] not in hub.lfs:
            raise Answer(400, f"the LFS object of {path} was not uploaded")
        tree[path] = File(hub.lfs[value["oid"]], lfs=True)
    elif key == "deletedFile":
        del tree[path]
    else:
        raise Answer(400, f"unknown operation {key}")


@route("POST", REPO + "/commit/(?P<revision>[^/]+)")
def commit(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    pull_request = "create_pr" in request.query
    repo = hub.find(request, kind, repo_id, write=not pull_request)
    if revision not in repo.branches:
        raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    about = header["value"]
    if about.get("parentCommit", repo.branches[revision]) != repo.branches[revision]:
        raise Answer(412, "A commit has happened since. Please refresh and try again.")
    tree = dict(repo.at(revision).tree)
    for operation in operations:
        apply(hub, tree, operation["key"], operation["value"])
    said = {}
    if pull_request:
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
        said["pullRequestUrl"] = f"{hub.url}/{repo_id}/discussions/{number}"
        repo.branches[f"refs/pr/{number}"] = repo.branches[revision]
        revision = f"refs/pr/{number}"
    made = repo.commit(tree, about["summary"], revision, about["description"])
    url = f"{hub.url}/{repo_id}/commit/{made.sha}"
    return answer({"success": True, "commitOid": made.sha, "commitUrl": url, **said})


@route("POST", REPO + "/super-squash/(?P<branch>[^/]+)")
def super_squash(hub: HubServer, request: Request, kind: str, repo_id: str, branch: str) -> Response:
    repo = hub.find(request, kind, repo_id, write=True)
    tree = repo.at(branch).tree
    del repo.branches[branch]
    repo.commit(tree, request.json()["message"], branch)
    return answer({})


@route("POST", REPO + "/branch/(?P<branch>[^/]+)")
def create_branch(hub: HubServer, request: Request, kind: str, repo_id: str, branch: str) -> Response:
    repo = hub.find(request, kind, repo_id, write=True)
    if branch in repo.branches:
        raise Answer(409, "Reference already exists")
    repo.branches[branch] = repo.at(request.json().get("startingPoint", "main")).sha
    return answer({})


@route("POST", REPO + "/tag/(?P<revision>[^/]+)")
def create_tag(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    repo = hub.find(request, kind, repo_id, write=True)
    tag = request.json()["tag"]
    if tag in repo.tags:
        raise Answer(409, "Tag already exists")
    repo.tags[tag] = repo.at(revision).sha
    return answer({})


@route("DELETE", REPO + "/tag/(?P<tag>[^/]+)")
def delete_tag(hub: HubServer, request: Request, kind: str, repo_id: str, tag: str) -> Response:
    repo = hub.find(request, kind, repo_id, write=True)
    if repo.tags.pop(tag, None) is None:
        raise Answer(404, "no such tag", "RevisionNotFound")
    return answer({})


@route("POST", "/api/spaces/(?P<repo_id>[^/]+/[^/]+)/(?P<what>secrets|variables|hardware)")
def space_setting(hub: HubServer, request: Request, repo_id: str, what: str) -> Response:
    settings, asked = hub.find(request, "spaces", repo_id, write=True).settings, request.json()
    if what == "hardware":
        settings["hardware"] = asked["flavor"]
        return answer({"stage": "BUILDING", "hardware": {"current": None, "requested": asked["flavor"]}})
    settings[what][asked["key"]] = asked["value"]
    return answer({key: {"value": value} for key, value in settings["variables"].items()})


@route("POST", "/api/jobs/(?P<namespace>[^/]+)")
def run_job(hub: HubServer, request: Request, namespace: str) -> Response:
    if request.user is None or namespace not in (request.user.name, *request.user.orgs):
        raise Answer(403 if request.user else 401, f"You don't have the rights to run jobs in {namespace}")
    asked = request.json()
    hub.jobs.append({**asked, "namespace": namespace})
    told = {name: asked.get(name) for name in ("command", "arguments", "environment", "flavor", "dockerImage")}
    return answer({
        **told, "id": f"job{len(hub.jobs)}", "createdAt": DATE, "status": {"stage": "SCHEDULING", "message": None},
        "owner": {"id": "1", "name": namespace, "type": "user"}, "secrets": [*asked.get("secrets", {})],
    })  # fmt: skip


# --- reading ----------------------------------------------------------------------------------------------------------
@route("GET", r"(?P<kind>/spaces|/datasets)?/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub: HubServer, request: Request, kind: str | None, repo_id: str, revision: str, path: str) -> Response:
    repo = hub.find(request, (kind or "/models")[1:], repo_id)
    if repo.gated and (request.user is None or request.user.name != repo_id.split("/")[0]):
        raise Answer(403 if request.user else 401, "Access to this model is restricted", "GatedRepo")
    commit = repo.at(revision)
    if path not in commit.tree:
        raise Answer(404, "Entry not found", "EntryNotFound")
    file = commit.tree[path]
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"'}
    if not file.lfs:
        return ranged(request, file.data, headers)
    hub.lfs[file.sha256] = file.data
    linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
    return 302, {**headers, **linked, "Location": f"{hub.cdn}/cdn/{file.sha256}/{path}"}, b""


@route("GET", "/cdn/(?P<oid>[0-9a-f]{64})/(?P<path>.+)")
def cdn(hub: HubServer, request: Request, oid: str, path: str) -> Response:
    data = hub.lfs[oid]
    if path in hub.corrupt:
        data = data[:-1] + bytes([data[-1] ^ 1])
    return ranged(request, data, {"ETag": f'"{oid}"'})


def ranged(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    found = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
    if not found:
        return 200, headers, data
    start = int(found[1])
    return 206, {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, data[start:]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args) -> None:
        pass

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def handle_any(self) -> None:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        user = self.hub.users.get(headers.get("authorization", "").removeprefix("Bearer "))
        query = parse_qs(parts.query)
        request = Request(self.command, parts.path, query, headers, b"", user, headers["host"].split(":")[0])
        self.hub.requests.append(request)
        fault = self.hub.fault_for(request)
        if fault and fault.drop and not fault.applied:
            return self.hang_up()  # before the body is read: an upload breaks half way
        request.body = self.read_body()
        return self.respond(request, fault)

    def respond(self, request: Request, fault: Fault | None) -> None:
        status, headers, body = 0, {}, b""
        if fault is not None:
            time.sleep(fault.hang)
        if fault is None or fault.applied:
            try:
                status, headers, body = self.hub.dispatch(request)
            except Answer as error:
                status, headers, body = answer(error.body, error.status, error.headers)
        if fault is not None:
            if fault.drop:
                return self.hang_up()
            status, headers, body = answer({"error": "failing on request"}, fault.status, fault.headers)
        return self.send(status, headers, body)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        try:
            self.send_response(status)
            for name, value in {**headers, **ANY_ORIGIN, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except OSError:  # the client went away while the server hung
            self.close_connection = True

    def do_OPTIONS(self) -> None:
        """What a browser asks before a page of another origin may send a token."""
        self.send(204, {"Access-Control-Allow-Headers": "authorization"}, b"")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any
