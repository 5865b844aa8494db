"""Downloads of published weights, from a server of this process."""

import dataclasses
import functools
import hashlib
import http.server
import pathlib
import re
import threading

import pytest

from gigatok_jax.errors import UserError
from gigatok_jax.weights import fetch

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclasses.dataclass
class Behaviour:
    """What the server does with the next requests, and what it was asked."""

    content: bytes = CONTENT
    version: str | None = '"1"'  # the ETag
    statuses: list[int] = dataclasses.field(default_factory=list)  # refusals to begin with
    cuts: list[int] = dataclasses.field(default_factory=list)  # bytes after which it hangs up
    ranges: list[str | None] = dataclasses.field(default_factory=list)  # as received


class Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, behaviour, *args):
        self.behaviour = behaviour
        super().__init__(*args)

    def do_GET(self):
        behaviour = self.behaviour
        asked = self.headers.get("Range")
        behaviour.ranges.append(asked)
        if behaviour.statuses:
            return self.send_error(behaviour.statuses.pop(0))
        body, total = behaviour.content, len(behaviour.content)
        start = 0
        if asked and self.headers.get("If-Range") == behaviour.version:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if behaviour.version:
            self.send_header("ETag", behaviour.version)
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        self.wfile.write(body[start:][: behaviour.cuts.pop(0) if behaviour.cuts else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    behaviour = Behaviour()
    handler = functools.partial(Handler, behaviour)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        behaviour.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield behaviour
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def direct_and_without_pauses(monkeypatch):
    monkeypatch.setattr(fetch, "PAUSES", (0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def publish(monkeypatch, server):
    """Makes the server's files the published ones, called "it"."""

    def publish(sha256=SHA256, *more):
        hashes = (sha256, *more)
        files = [fetch.File(f"{server.url}/{i}.pth", h) for i, h in enumerate(hashes)]
        monkeypatch.setitem(fetch.PUBLISHED, "it", fetch.Published("dinov2", "", tuple(files)))

    publish()
    return publish


def names(directory: pathlib.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_files_are_downloaded_once(tmp_path, server, publish):
    publish(SHA256, SHA256)
    expected = [tmp_path / "new" / "0.pth", tmp_path / "new" / "1.pth"]
    for _ in range(2):
        assert fetch.download("it", cache=tmp_path / "new") == expected
    assert [path.read_bytes() for path in expected] == [CONTENT, CONTENT]
    assert len(server.ranges) == 2
    assert names(tmp_path / "new") == ["0.pth", "1.pth"]


def test_lost_connection_is_resumed_where_it_broke(tmp_path, server, publish):
    server.cuts = [1000, 2000, 500]
    (path,) = fetch.download("it", cache=tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000-", "bytes=3000-", "bytes=3500-"]
    assert names(tmp_path) == ["0.pth"]


def test_killed_download_is_resumed_by_the_next(tmp_path, server, publish):
    (tmp_path / "0.pth.partial").write_bytes(CONTENT[:700])
    (tmp_path / "0.pth.partial.version").write_text('"1"')
    (path,) = fetch.download("it", cache=tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.ranges == ["bytes=700-"]


def test_complete_partial_file_is_not_downloaded_again(tmp_path, server, publish):
    (tmp_path / "0.pth.partial").write_bytes(CONTENT)
    (tmp_path / "0.pth.partial.version").write_text('"1"')
    (path,) = fetch.download("it", cache=tmp_path)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["0.pth"]


@pytest.mark.parametrize("version", ['"2"', 'W/"1"', None])
def test_partial_file_of_another_version_is_started_over(tmp_path, server, publish, version):
    (tmp_path / "0.pth.partial").write_bytes(b"x" * 700)
    (tmp_path / "0.pth.partial.version").write_text('"1"')
    server.version = version
    server.cuts = [1000]
    (path,) = fetch.download("it", cache=tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.ranges[1] == ("bytes=1000-" if version == '"2"' else None)


def test_partial_file_longer_than_the_servers_is_started_over(tmp_path, server, publish):
    (tmp_path / "0.pth.partial").write_bytes(CONTENT + b"x")
    (tmp_path / "0.pth.partial.version").write_text('"1"')
    (path,) = fetch.download("it", cache=tmp_path)
    assert path.read_bytes() == CONTENT


def test_half_a_file_is_never_seen_under_its_name(tmp_path, server, publish):
    server.cuts = [1000, 0, 0]
    with pytest.raises(UserError, match="connection lost at byte 1000 of 10240"):
        fetch.download("it", cache=tmp_path)
    assert names(tmp_path) == ["0.pth.partial", "0.pth.partial.version"]
    fetch.download("it", cache=tmp_path)
    assert names(tmp_path) == ["0.pth"]


def test_busy_server_is_asked_again(tmp_path, server, publish):
    server.statuses = [503, 429]
    (path,) = fetch.download("it", cache=tmp_path)
    assert path.read_bytes() == CONTENT


def test_missing_page_says_which_file_to_put_where(tmp_path, server, publish):
    server.statuses = [404]
    with pytest.raises(UserError) as error:
        fetch.download("it", cache=tmp_path)
    message = str(error.value)
    assert "HTTP Error 404" in message and "\n" not in message
    assert f"{server.url}/0.pth" in message and str(tmp_path / "0.pth") in message
    assert len(server.ranges) == 1
    assert names(tmp_path) == []


def test_missing_connection_says_which_file_to_put_where(tmp_path, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/file.pth"
    published = fetch.Published("dinov2", "", (fetch.File(url),))
    monkeypatch.setitem(fetch.PUBLISHED, "it", published)
    monkeypatch.setattr(fetch, "PAUSES", (10_000,))  # it says so at once
    with pytest.raises(UserError) as error:
        fetch.download("it", cache=tmp_path)
    message = str(error.value)
    assert "refused" in message and url in message and str(tmp_path / "file.pth") in message


def test_download_with_another_hash_is_rejected_and_deleted(tmp_path, publish):
    publish("0" * 64)
    with pytest.raises(UserError, match=f"SHA-256 is {SHA256}, expected {'0' * 64}"):
        fetch.download("it", cache=tmp_path)
    assert names(tmp_path) == []


def test_file_put_by_hand_is_used_without_a_connection(tmp_path, server, publish):
    path = tmp_path / "0.pth"
    path.write_bytes(CONTENT)
    assert fetch.download("it", cache=tmp_path) == [path]
    assert server.ranges == []


def test_file_put_by_hand_with_another_hash_is_rejected_and_kept(tmp_path, server, publish):
    path = tmp_path / "0.pth"
    path.write_bytes(b"mine")
    with pytest.raises(UserError) as error:
        fetch.download("it", cache=tmp_path)
    assert hashlib.sha256(b"mine").hexdigest() in str(error.value)
    assert SHA256 in str(error.value) and str(path) in str(error.value)
    assert path.read_bytes() == b"mine"
    assert server.ranges == []


def test_unknown_hash_is_recorded_and_another_rejected_later(tmp_path, server, publish, capfd):
    publish(None)
    (path,) = fetch.download("it", cache=tmp_path)
    record = tmp_path / "0.pth.sha256"
    assert record.read_text() == f"{SHA256}  0.pth\n"
    assert SHA256 in capfd.readouterr().err
    path.unlink()
    server.content = b"changed"
    changed = hashlib.sha256(b"changed").hexdigest()
    with pytest.raises(UserError, match=f"SHA-256 is {changed}, expected {SHA256}"):
        fetch.download("it", cache=tmp_path)
    assert names(tmp_path) == ["0.pth.sha256"]


def test_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(
        UserError, match=r"'dinov3': no such weights; known: .*dinov2_vitb14.*lpips_vgg16"
    ):
        fetch.download("dinov3", cache=tmp_path)


def test_cache_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"dinov2_vits14.*cannot be stored in .*file"):
        fetch.download("dinov2_vits14", cache=tmp_path / "file")


def test_published_files_have_their_own_names_and_well_formed_hashes():
    files = {file for published in fetch.PUBLISHED.values() for file in published.files}
    assert len({file.name for file in files}) == len(files)
    for file in files:
        assert file.url.startswith("https://")
        assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{64}", file.sha256)
