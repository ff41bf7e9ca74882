"""Errors in the OpenAI API's shape.

Takes a refusal or an exception; gives a status and a JSON document. It does not know routes.
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from serving.messages import Refused

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
_MOST_NAMED = 8
_MOST_CHARACTERS = 80
# One sentence for fields of several forms, where a schema would list a problem for each form.
_FORMS = {
    "prompt": "expected a string, a list of strings, a list of token ids or a list of such lists",
    "stop": "expected a string or a list of at most 4 strings, each of 1 to 256 characters",
    "content": "expected a string or a list of parts like {'type': 'text', 'text': '...'}",
}


class RefusedError(Exception):
    """Ends a request inside the gateway; it is rendered at the edge and goes no further."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.message)
        self.refused = refused


def document(refused: Refused) -> dict[str, Any]:
    """Return the body that the OpenAI API has for an error."""
    is_ours = refused.status >= HTTPStatus.INTERNAL_SERVER_ERROR
    default = "server_error" if is_ours else "invalid_request_error"
    return {
        "error": {
            "message": refused.message,
            "type": _TYPES.get(refused.status, default),
            "param": refused.param,
            "code": refused.code,
        }
    }


def response(refused: Refused) -> JSONResponse:
    """Return the whole answer to a request that was refused."""
    headers = {}
    if refused.retry_after_s is not None:
        headers["Retry-After"] = str(refused.retry_after_s)
    if refused.status is HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(document(refused), int(refused.status), headers)


def from_validation(problems: Sequence[Any]) -> Refused:
    """Return a refusal that names wrong fields, their values and what was expected.

    What a client sent is cut, so that a large body does not come back as a large error.
    """
    if any(problem["type"] == "json_invalid" for problem in problems):
        reason = problems[0].get("ctx", {}).get("error", "")
        return Refused(HTTPStatus.BAD_REQUEST, f"the body is not valid JSON: {reason}".rstrip(": "))
    found: dict[str, str] = {}
    for problem in problems:
        name, text = _describe(problem)
        found.setdefault(name, text)
    param = next((name for name in found if name), None)
    named = list(found.values())[:_MOST_NAMED]
    if len(found) > len(named):
        named.append(f"and {len(found) - len(named)} more")
    return Refused(HTTPStatus.BAD_REQUEST, "; ".join(named) + ".", param=param)


def shorten(value: object) -> str:
    """Return how a value looks in a message."""
    return _cut(repr(value))


def _describe(problem: Any) -> tuple[str, str]:
    path = [part for part in problem["loc"] if part != "body"]
    for at, part in enumerate(path):
        if part in _FORMS and problem["type"] != "missing":
            name = _join(path[: at + 1])
            return name, f"`{name}`: {_FORMS[part]}"
    name = _join(path)
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if problem["type"] == "extra_forbidden":
        return name, f"`{name}` is not a field of this request"
    if problem["type"] == "missing":
        return name, f"`{name}` is required" if name else "a JSON body is required"
    if not name:
        return name, message
    return name, f"`{name}` = {shorten(problem.get('input'))}: {message}"


def _join(path: Sequence[int | str]) -> str:
    return _cut(".".join(str(part) for part in path))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."
