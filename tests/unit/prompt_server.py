"""A server that answers prompts from a table, for tests of what compares answers over REST."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class PromptServer:
    """Answers by prompt, else by model and prompt; what is not there with `missing_status`."""

    port: int = 0
    answers: dict[str | tuple[str, str], str] = field(default_factory=dict)
    missing_status: int = 404
    asked: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, body: dict[str, Any]) -> str | None:
        self.asked.append(body)
        by_prompt = self.answers.get(body["prompt"])
        return self.answers.get((body["model"], body["prompt"]), by_prompt)


@contextmanager
def running_server() -> Iterator[PromptServer]:
    state = PromptServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = state.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(state.missing_status if text is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"text": text}]}).encode())

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.port = listening.server_address[1]
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield state
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join(5)
