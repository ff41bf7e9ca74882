"""Errors in the OpenAI API's shape.

Takes a refusal or what was wrong in a body; gives a JSON document. It does not know routes.
"""

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from serving.messages import Refused

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
_MOST_NAMED = 8
_MOST_CHARACTERS = 80
_MOST_SENTENCE_CHARACTERS = 240
# One sentence for fields of several forms, where a schema would list a problem for each form.
_FORMS = {
    "prompt": "expected a string, a list of strings, a list of token ids or a list of such lists",
    "stop": "expected a string or a list of at most 4 strings, each of 1 to 256 characters",
    "content": "expected a string or a list of parts like {'type': 'text', 'text': '...'}",
    "input": "expected a string, a list of strings, a list of token ids or a list of such lists",
    "tool_choice": "expected 'none', 'auto', 'required' or {'type': 'function', 'function': "
    "{'name': '...'}}",
    "guided_json": "expected a JSON schema, as an object or as its text",
}
_PLACES = frozenset({"body", "header", "query", "path"})
# What tells the forms of a union apart is no part of a field's name.
_TAG = re.compile(r"system|developer|user|assistant|tool|text|json_object|json_schema|/v1/.*")


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
    path = _field_path(problem["loc"])
    for at, part in enumerate(path):
        if part in _FORMS and problem["type"] != "missing":
            name = _join(path[: at + 1])
            return name, f"`{name}`: {_FORMS[part]}"
    name = _join(path)
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = _cut(message, _MOST_SENTENCE_CHARACTERS)  # It may quote what was sent.
    if problem["type"] == "extra_forbidden":
        return name, f"`{name}` is not a field of this request"
    if problem["type"] == "missing":
        return name, f"`{name}` is required" if name else "a JSON body is required"
    if not name:
        return name, message
    return name, f"`{name}` = {shorten(problem.get('input'))}: {message}"


def _field_path(loc: Sequence[int | str]) -> list[int | str]:
    parts: list[int | str] = []
    is_after_tag = False
    for part in loc:
        before = parts[-1] if parts else None
        is_at_union = before is None or isinstance(before, int) or before == "response_format"
        is_tag = isinstance(part, str) and _TAG.fullmatch(part) is not None
        if is_tag and is_at_union and not is_after_tag:
            is_after_tag = True
        elif part not in _PLACES:
            parts.append(part)
            is_after_tag = False
    return parts


def _join(path: Sequence[int | str]) -> str:
    return _cut(".".join(str(part) for part in path))


def _cut(text: str, most: int = _MOST_CHARACTERS) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


REFUSED_FOR_NOW = Refused(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "the server cannot take requests now. Try again in a moment.",
    retry_after_s=1,
)
REFUSED_INTERNALLY = Refused(
    HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed. The operator finds the reason in its log."
)
