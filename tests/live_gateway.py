"""A gateway over fakes behind a real HTTP server, for tests with real clients."""

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from gateway_fakes import KEY, FakeBackend, Gateway


@dataclass
class Live:
    """Where it listens, and what is behind it."""

    url: str
    gateway: Gateway

    def environment(self) -> dict[str, str]:
        """Return what the examples of docs/http-api.md expect."""
        return {
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",  # noqa: PTH120
            "RAYSMITH_URL": self.url,
            "RAYSMITH_API_KEY": KEY,
            "RAYSMITH_MODEL": "tiny",
            "RAYSMITH_ENCODER": "mini",
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def serve(backend: FakeBackend | None = None, **limits: float) -> Iterator[Live]:
    """Run a gateway in a thread for as long as the block runs."""
    gateway = Gateway(backend, **limits)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)  # So that a client may come before the server is up.
    config = uvicorn.Config(gateway.app, log_level="warning", lifespan="on", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Live(f"http://127.0.0.1:{listener.getsockname()[1]}", gateway)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()
