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
    """Return a refusal that names every wrong field, its value and what was expected."""
    if any(problem["type"] == "json_invalid" for problem in problems):
        reason = problems[0].get("ctx", {}).get("error", "")
        return Refused(HTTPStatus.BAD_REQUEST, f"the body is not valid JSON: {reason}".rstrip(": "))
    found: dict[str, str] = {}
    for problem in problems:
        name, text = _describe(problem)
        found.setdefault(name, text)
    param = next((name for name in found if name), None)
    return Refused(HTTPStatus.BAD_REQUEST, "; ".join(found.values()) + ".", param=param)


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
    return name, f"`{name}` = {_shorten(problem.get('input'))}: {message}"


def _join(path: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in path)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
