"""What an answer must look like: the spellings that OpenAI and vLLM have for it.

Takes JSON; gives a `Structure`. It does not know whether an engine can follow it.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from serving.engines._protocol import GrammarKind
from serving.gateway.schemas_base import Body
from serving.messages import Structure

MAX_STRUCTURE_CHARACTERS = 100_000
MAX_CHOICES_OFFERED = 1024

JsonSchema = dict[str, Any]
SchemaOrText = JsonSchema | Annotated[str, Field(max_length=MAX_STRUCTURE_CHARACTERS)]
Pattern = Annotated[str, Field(min_length=1, max_length=MAX_STRUCTURE_CHARACTERS)]
Offered = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1000)]],
    Field(min_length=1, max_length=MAX_CHOICES_OFFERED),
]


class NamedSchema(Body):
    """A schema as OpenAI's `response_format` carries it."""

    name: str = Field(min_length=1, max_length=64, description="Its name; not used.")
    description: str | None = Field(default=None, max_length=10_000, description="Not used.")
    json_schema: JsonSchema = Field(alias="schema", description="The JSON schema.")
    strict: bool | None = Field(default=None, description="Answers always follow the schema.")


class TextFormat(Body):
    """Any text."""

    type: Literal["text"] = Field(description="No structure.")


class JsonFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"] = Field(description="A JSON object.")


class SchemaFormat(Body):
    """JSON that follows a schema."""

    type: Literal["json_schema"] = Field(description="JSON after a schema.")
    json_schema: NamedSchema = Field(description="The schema.")


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """vLLM's spelling; exactly one of its fields (an extension)."""

    json_schema: SchemaOrText | None = Field(default=None, alias="json", description="A schema.")
    regex: Pattern | None = Field(default=None, description="A regular expression.")
    choice: Offered | None = Field(default=None, description="One of these texts.")
    json_object: Literal[True] | None = Field(default=None, description="Any JSON object.")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if len(list(self.structures())) != 1:
            raise ValueError("give exactly one of `json`, `regex`, `choice` and `json_object`")
        return self

    def structures(self) -> Iterable[Structure]:
        """Yield what is asked for."""
        yield from _structures(self.json_schema, self.regex, self.choice)
        if self.json_object:
            yield Structure(GrammarKind.JSON_OBJECT)


class Structured(Body):
    """The fields that both kinds of generation request have for it."""

    response_format: ResponseFormat | None = Field(default=None, description="Text or JSON.")
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="JSON, regular expression or choice (an extension)."
    )
    guided_json: SchemaOrText | None = Field(default=None, description="A schema (an extension).")
    guided_regex: Pattern | None = Field(default=None, description="An extension.")
    guided_choice: Offered | None = Field(default=None, description="An extension.")

    @model_validator(mode="after")
    def _check_structure(self) -> Self:
        if len(self._all_structures()) > 1:
            raise ValueError(
                "give at most one of `response_format`, `structured_outputs`, `guided_json`, "
                "`guided_regex` and `guided_choice`"
            )
        return self

    def structure(self) -> Structure | None:
        """Return what answers must look like, or None if anything goes."""
        return next(iter(self._all_structures()), None)

    def _all_structures(self) -> list[Structure]:
        found = list(_structures(self.guided_json, self.guided_regex, self.guided_choice))
        if self.structured_outputs is not None:
            found.extend(self.structured_outputs.structures())
        if isinstance(self.response_format, JsonFormat):
            found.append(Structure(GrammarKind.JSON_OBJECT))
        if isinstance(self.response_format, SchemaFormat):
            found.append(schema_structure(self.response_format.json_schema.json_schema))
        return found


def schema_structure(schema: Mapping[str, Any] | str) -> Structure:
    """Return the structure of a JSON schema; raises ValueError if it is too long or no JSON."""
    text = schema if isinstance(schema, str) else _dump(schema)
    if isinstance(schema, str) and not isinstance(_load(schema), dict):
        raise ValueError("a JSON schema must be a JSON object")
    if len(text) > MAX_STRUCTURE_CHARACTERS:
        raise ValueError(
            f"the schema has {len(text)} characters; at most {MAX_STRUCTURE_CHARACTERS} are taken"
        )
    return Structure(GrammarKind.JSON_SCHEMA, text)


def _structures(
    schema: SchemaOrText | None, regex: str | None, choice: list[str] | None
) -> Iterable[Structure]:
    if schema is not None:
        yield schema_structure(schema)
    if regex is not None:
        yield Structure(GrammarKind.REGEX, regex)
    if choice is not None:
        yield Structure(GrammarKind.CHOICE, _dump(choice))


def _dump(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()  # Raises UnicodeEncodeError, a ValueError, for half of a surrogate pair.
    return text


def _load(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("a JSON schema must be valid JSON") from None
