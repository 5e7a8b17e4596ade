"""Published weights against a server on loopback that holds the bytes, stops, lies, stalls or hides them."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from protos.errors import BundleError, ConfigError, UnknownModelError, UnreachableError
from splitters import cli
from splitters.zoo import fetch as module
from splitters.zoo.fetch import fetch
from splitters.zoo.published import Published, find, published

CONTENT = bytes(range(256)) * 2000
WANTED = Published(
    name="stand-in", repository="owner/models", commit="c" * 40, path="a/model.onnx", bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(), licence="Apache-2.0",
)  # fmt: skip
Answer = Callable[[BaseHTTPRequestHandler, int], None]


@contextmanager
def serving(*answers: Answer) -> Iterator[tuple[str, list[str]]]:
    """A server whose n-th request is answered by the n-th function, the last one again and again; and what was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            start = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")
            asked.append(f"{self.path} {start}")
            answers[min(len(asked), len(answers)) - 1](self, int(start))

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def send(content: bytes, *, upto: int | None = None, ranges: bool = True) -> Answer:
    def answer(request: BaseHTTPRequestHandler, start: int) -> None:
        begin = start if ranges else 0
        body = content[begin:]
        request.send_response(206 if begin else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[:upto])

    return answer


def status(code: int) -> Answer:
    return lambda request, start: request.send_error(code)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADTAIL_CACHE", str(tmp_path / "cache"))
    for variable in (module.MIRROR_VARIABLE, module.WEIGHTS_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "cache"


def test_a_file_is_fetched_once_and_known_by_its_hash(own_cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    with serving(send(CONTENT)) as (mirror, asked):
        first = fetch(WANTED, mirror=mirror, progress=lambda have, total: seen.append((have, total)))
        assert fetch(WANTED, mirror=mirror) == first
    assert asked == [f"/owner/models/{'c' * 40}/a/model.onnx 0"]
    assert first.read_bytes() == CONTENT
    assert first.is_relative_to(own_cache)
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_download_that_stopped_goes_on_where_it_stopped() -> None:
    with serving(send(CONTENT, upto=100_000), send(CONTENT)) as (mirror, asked):
        with pytest.raises(UnreachableError, match="at 100000 of 512000 bytes"):
            fetch(WANTED, mirror=mirror)
        assert fetch(WANTED, mirror=mirror).read_bytes() == CONTENT
    assert [a.split()[1] for a in asked] == ["0", "100000"]


def test_a_server_that_knows_no_ranges_begins_again() -> None:
    with serving(send(CONTENT, upto=100_000), send(CONTENT, ranges=False)) as (mirror, _):
        with pytest.raises(UnreachableError):
            fetch(WANTED, mirror=mirror)
        assert fetch(WANTED, mirror=mirror).read_bytes() == CONTENT


def test_other_bytes_are_refused_and_not_kept(own_cache: Path) -> None:
    altered = CONTENT[:-1] + b"x"
    with serving(send(altered)) as (mirror, _), pytest.raises(BundleError, match="nothing was kept"):
        fetch(WANTED, mirror=mirror)
    assert [f.suffix for f in (own_cache / "weights").iterdir()] == [".lock"]


def test_no_more_is_read_than_the_file_has(own_cache: Path) -> None:
    with serving(send(CONTENT + b"more" * 1_000_000)) as (mirror, _):
        assert fetch(WANTED, mirror=mirror).stat().st_size == len(CONTENT)


@pytest.mark.parametrize("code", [404, 403, 500])
def test_a_server_without_it_is_one_sentence(code: int) -> None:
    with serving(status(code)) as (mirror, _), pytest.raises(UnreachableError, match=f"answered {code}"):
        fetch(WANTED, mirror=mirror)


def test_a_server_that_stalls_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.3)
    held = threading.Event()

    def stall(request: BaseHTTPRequestHandler, start: int) -> None:
        send(CONTENT, upto=1000)(request, start)
        request.wfile.flush()
        held.wait(20)

    with serving(stall) as (mirror, _):
        with pytest.raises(UnreachableError, match="stopped at 1000"):
            fetch(WANTED, mirror=mirror)
        held.set()


def test_nobody_there() -> None:
    with pytest.raises(UnreachableError, match="cannot be reached"):
        fetch(WANTED, mirror="http://127.0.0.1:9")


def test_without_a_network_a_file_or_a_folder_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stick"
    folder.mkdir()
    (folder / "other.onnx").write_bytes(b"x" * len(CONTENT))
    with pytest.raises(BundleError, match="holds no file"):
        fetch(WANTED, weights=folder)
    (folder / "renamed.onnx").write_bytes(CONTENT)
    assert fetch(WANTED, weights=folder).name == "renamed.onnx"
    assert fetch(WANTED, weights=folder / "renamed.onnx").name == "renamed.onnx"
    with pytest.raises(BundleError, match="is not stand-in"):
        fetch(WANTED, weights=folder / "other.onnx")
    monkeypatch.setenv(module.WEIGHTS_VARIABLE, str(folder))
    assert fetch(WANTED).name == "renamed.onnx"


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="https"):
        fetch(WANTED, mirror="ftp://example")
    with pytest.raises(ConfigError, match="no file and no folder"):
        fetch(WANTED, weights=tmp_path / "absent")
    with pytest.raises(UnknownModelError, match="yolox-nano"):
        find("yolox-femto")


def test_a_file_that_was_carried_here_is_found_by_later_calls(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "stick.onnx").write_bytes(CONTENT)
    kept = fetch(WANTED, weights=tmp_path / "stick.onnx", keep=True)
    (tmp_path / "stick.onnx").unlink()
    assert kept.is_relative_to(own_cache)
    with serving(status(500)) as (mirror, asked):
        assert fetch(WANTED, mirror=mirror) == kept
    assert not asked


def test_the_table_is_whole() -> None:
    for one in published().values():
        assert len(one.commit) == 40
        assert len(one.sha256) == 64
        assert one.bytes > 1_000_000
        assert one.address.startswith("https://")
        assert one.licence


def test_the_command_says_licence_and_origin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("splitters.zoo.published.published", lambda: {"stand-in": WANTED})
    with serving(send(CONTENT)) as (mirror, _):
        assert cli.main(["fetch", "stand-in", "--mirror", mirror]) == 0
    said = capsys.readouterr().out
    assert "Apache-2.0" in said
    assert WANTED.address in said
