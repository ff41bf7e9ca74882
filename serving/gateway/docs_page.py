"""The API as one page of HTML: no scripts, nothing from elsewhere.

Takes the OpenAPI document; gives HTML. It does not know the routes' code.
"""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "pre{background:#f4f4f4;padding:.8rem;overflow:auto}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:left;vertical-align:top}"
)


def docs_page(document: Mapping[str, Any]) -> str:
    """Return the page: each route with its fields and its examples as curl commands."""
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{_title(document)}</title>",
        f"<style>{_STYLE}</style><h1>{_title(document)}</h1>",
        f"<p>{escape(document['info'].get('description', ''))}</p>",
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.extend(_operation(document, path, method, operation))
    return "".join(parts)


def _title(document: Mapping[str, Any]) -> str:
    return escape(f"{document['info']['title']} {document['info']['version']}")


def _operation(
    document: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]
) -> list[str]:
    parts = [
        f"<h2>{method.upper()} {escape(path)}</h2>",
        f"<p>{escape(operation.get('description', ''))} {escape(operation['x-rule'])}</p>",
    ]
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema = _resolved(document, content.get("schema", {}))
    rows = [_row(document, name, field) for name, field in schema.get("properties", {}).items()]
    if rows:
        parts.append("<table><tr><th>field</th><th>meaning</th></tr>" + "".join(rows) + "</table>")
    for name, example in content.get("examples", {}).items():
        command = _curl(path, method, example["value"])
        parts.append(f"<h3>{escape(name)}</h3><pre>{escape(command)}</pre>")
    return parts


def _row(document: Mapping[str, Any], name: str, field: Mapping[str, Any]) -> str:
    text = field.get("description") or _resolved(document, field).get("description", "")
    return f"<tr><td><code>{escape(name)}</code></td><td>{escape(text)}</td></tr>"


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    found: Mapping[str, Any] = document["components"]["schemas"][reference.rpartition("/")[2]]
    return found


def _curl(path: str, method: str, body: Mapping[str, Any]) -> str:
    text = json.dumps(body, indent=2).replace("'", "'\\''")
    return (
        f"curl -X {method.upper()} $RAYSMITH_URL{path} \\\n"
        '  -H "Authorization: Bearer $RAYSMITH_API_KEY" \\\n'
        f"  -H 'Content-Type: application/json' \\\n  -d '{text}'"
    )
