"""Tools that a chat may call: how requests name them, and what a forced call must look like.

Takes JSON; gives checked tools. It does not know how a model is told of them.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from serving.gateway.schemas_base import Body, Text
from serving.gateway.schemas_structure import schema_structure
from serving.messages import Structure

MAX_TOOLS = 128

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Function(Body):
    """A function that the model may ask to be called."""

    name: FunctionName = Field(description="Its name.")
    description: str | None = Field(default=None, max_length=100_000, description="What it does.")
    parameters: dict[str, Any] | None = Field(
        default=None, description="JSON schema of its arguments."
    )
    strict: bool | None = Field(
        default=None, description="Not used: forced calls always follow the schema."
    )


class Tool(Body):
    """One tool; functions are the only kind."""

    type: Literal["function"] = Field(description="Kind of the tool.")
    function: Function = Field(description="The function.")


class FunctionRef(Body):
    """A function by name."""

    name: FunctionName = Field(description="Its name.")


class NamedTool(Body):
    """The one tool that must be called."""

    type: Literal["function"] = Field(description="Kind of the tool.")
    function: FunctionRef = Field(description="Which one.")


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(Body):
    """What an earlier answer called; `arguments` is a JSON text, as it was given out."""

    name: FunctionName = Field(description="Which function.")
    arguments: Text = Field(description="JSON text of the arguments.")


class ToolCallEcho(Body):
    """A call in an earlier answer, sent back."""

    id: str = Field(min_length=1, max_length=128, description="As the answer gave it.")
    type: Literal["function"] = Field(default="function", description="Kind of the tool.")
    function: CalledFunction = Field(description="What was called.")


def tools_text(tools: Sequence[Tool]) -> str:
    """Return the JSON text that the template gets; raises ValueError for what is no JSON."""
    documents = [tool.model_dump(exclude_unset=True) for tool in tools]
    text = json.dumps(documents, ensure_ascii=False, allow_nan=False)
    text.encode()  # Raises UnicodeEncodeError, a ValueError, for half of a surrogate pair.
    return text


def forced_call(functions: Sequence[Function]) -> Structure:
    """Return the structure of a call to one of these functions."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function.name},
                "arguments": function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    return schema_structure(calls[0] if len(calls) == 1 else {"anyOf": calls})
