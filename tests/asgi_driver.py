"""One ASGI request, message by message, for tests of what a client library would not send."""

import asyncio
from collections.abc import Sequence
from typing import Any

from gateway_fakes import KEY

JSON = (b"content-type", b"application/json")
AUTHORIZED = (b"authorization", f"Bearer {KEY}".encode())


def scope_of(method: str = "POST", path: str = "/v1/completions", **changes: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [AUTHORIZED, JSON],
        **changes,
    }


class Connection:
    """A client: gives body parts, then stays until it leaves; remembers what it was sent."""

    def __init__(self, *parts: bytes, is_ended: bool = True) -> None:
        self._messages = [
            {"type": "http.request", "body": part, "more_body": not is_ended or at < len(parts) - 1}
            for at, part in enumerate(parts or (b"",))
        ]
        self.left = asyncio.Event()
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.was_sent = asyncio.Event()
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        if self._messages:
            return self._messages.pop(0)
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self.was_sent.set()
        await self.may_send.wait()

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])


async def drive(app: Any, connection: Connection, **scope: Any) -> Connection:
    await app(scope_of(**scope), connection.receive, connection.send)
    return connection


def ask(app: Any, *parts: bytes, headers: Sequence[tuple[bytes, bytes]] = (), **scope: Any) -> Any:
    """Return the connection after one whole request."""
    if headers:
        scope["headers"] = list(headers)

    async def run() -> Connection:
        return await drive(app, Connection(*parts), **scope)

    return asyncio.run(run())
