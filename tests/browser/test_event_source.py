"""A browser's own EventSource reads an answer, from a page of another origin, as documented."""

import functools
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from gateway_fakes import KEY, FakeBackend
from live_gateway import Live, serve

from serving.messages import Delta, Refused, Started

pytestmark = [pytest.mark.browser]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
PAGE = Path(__file__).parents[2] / "docs" / "http-api.md"
LOST = Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the replica failed", "engine_failed")


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        del arguments


@pytest.fixture
def page_url(tmp_path: Path) -> Iterator[str]:
    """Serve the documentation's page from an origin of its own."""
    (html,) = re.findall(r"^```html\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "index.html").write_text(html)
    handler = functools.partial(QuietHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()
    thread.join()
    server.server_close()


def show(url: str, profile: Path) -> str:
    """Return the page as the browser has it once all is quiet."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
    ]
    command += ["--no-proxy-server", "--virtual-time-budget=20000", "--dump-dom", url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def address_of(live: Live) -> str:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
    body = {"endpoint": "/v1/chat/completions", "body": chat}
    headers = {"Authorization": f"Bearer {KEY}"}
    made = httpx.post(f"{live.url}/v1/event-streams", json=body, headers=headers)
    return live.url + made.json()["url"]


def test_event_source_when_it_reads_a_stream_shows_the_whole_answer(page_url, tmp_path):
    with serve() as live:
        dom = show(f"{page_url}?address={quote(address_of(live))}", tmp_path / "profile")
    assert '<p id="answer">Hello</p>' in dom
    assert "<title>done</title>" in dom


def test_event_source_when_the_stream_breaks_is_told_why(page_url, tmp_path):
    with serve(FakeBackend([Started(1), Delta(0, "He", (1,))], [LOST])) as live:
        dom = show(f"{page_url}?address={quote(address_of(live))}", tmp_path / "profile")
    assert '<p id="answer">He</p>' in dom
    assert "<title>the replica failed</title>" in dom


def test_event_source_when_its_address_was_used_is_refused(page_url, tmp_path):
    with serve() as live:
        address = address_of(live)
        assert httpx.get(address).status_code == 200
        dom = show(f"{page_url}?address={quote(address)}", tmp_path / "profile")
    assert "<title>disconnected</title>" in dom
