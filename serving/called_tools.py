"""Tool calls of earlier answers, as chat templates get them: with their arguments as objects.

Takes the JSON text of OpenAI's list; gives values. It does not know templates or who reads them.
"""

import json
from typing import Any

from cluster.errors import RequestError


def template_calls(tool_calls: str) -> list[dict[str, Any]]:
    """Return tool calls for a template, which writes their arguments out as JSON again.

    Raises RequestError for arguments that are nested too deeply.
    """
    return [_with_object(call) for call in json.loads(tool_calls)]


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        arguments = function["arguments"]  # A model wrote no JSON; the template shows it as it is.
    except RecursionError as error:
        raise RequestError(
            f"the arguments of a call of `{function['name']}` are nested too deeply. Flatten them."
        ) from error
    return {**call, "function": {**function, "arguments": arguments}}
