"""An application whose OpenAPI document also says what FastAPI cannot know: keys and rules.

Takes routes; gives the document. It does not know what routes do.
"""

from typing import Any

from fastapi import FastAPI

from serving.gateway.rules import RULES, Access, Rule

_SCHEME = "key"


class GatewayApi(FastAPI):
    """FastAPI, with every operation's rule in its document."""

    def openapi(self) -> dict[str, Any]:
        """Return the document; it is made when it is first asked for."""
        if self.openapi_schema is None:
            self.openapi_schema = _completed(super().openapi())
        return self.openapi_schema


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    components = document.setdefault("components", {})
    components["securitySchemes"] = {_SCHEME: {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete(operation, RULES[method.upper(), path])
    for unused in ("HTTPValidationError", "ValidationError"):
        components.get("schemas", {}).pop(unused, None)
    return document


def _complete(operation: dict[str, Any], rule: Rule) -> None:
    operation["responses"].pop("422", None)  # Wrong bodies are 400 here, as in OpenAI's API.
    operation["security"] = [{_SCHEME: []}] if rule.access is Access.KEY else []
    operation["x-rule"] = _sentence(rule)


def _sentence(rule: Rule) -> str:
    if rule.access is not Access.KEY:
        return f"Needs {rule.access.value}."
    if not rule.scopes:
        return "Needs a key."
    scopes = " or ".join(sorted(scope.value for scope in rule.scopes))
    return f"Needs a key with the scope {scopes} or admin."
