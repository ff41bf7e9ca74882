"""Configuration: strict, frozen models read from YAML with `--set a.b=c` on top.

Takes a file and overrides; gives a validated model or one ConfigError that lists every problem.
It does not know any particular configuration: those live beside what they configure.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from cluster.errors import ConfigError


class StrictModel(BaseModel):
    """Base of all configuration and value models: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` for a number: YAML reads `yes` and `on` as true, and pydantic that as 1."""
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            kinds = set(get_args(annotation) or (annotation,))
            if kinds & {int, float} and bool not in kinds:
                raise ValueError("expected a number")
        return value

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with some fields changed."""
        return type(self).model_validate({**self.model_dump(), **changes})


ModelT = TypeVar("ModelT", bound=StrictModel)


def load_config(
    model: type[ModelT], path: str | Path | None = None, overrides: Sequence[str] = ()
) -> ModelT:
    """Read a YAML file into `model`, with `a.b=value` overrides applied last.

    Values of overrides are YAML, so `--set steps=3` is an integer and `--set paths=[a,b]` a list.
    Raises ConfigError with every problem found, each with its key, value and remedy.
    """
    source = str(path) if path is not None else "no --config given"
    document = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        _apply_override(document, override)
    return parse_config(model, document, source)


def parse_config(model: type[ModelT], document: Any, source: str) -> ModelT:
    """Validate a plain document into `model`; `source` names it in errors."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        problems = [_describe(model, detail) for detail in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(problems)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Give the path of a YAML config.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(document).__name__}.")
    return document


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, separator, raw = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {override}: expected key.subkey=value.")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from None
    node = document
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: `{part}` is a single value and has no subkeys.")
        node = child
    node[parts[-1]] = value


def _describe(model: type[BaseModel], detail: ErrorDetails) -> str:
    location = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = _known_keys(model, detail["loc"][:-1])
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(known)}."
        return f"unknown key `{location}`; {hint}"
    if detail["type"] == "missing":
        return f"`{location}` is required and not set"
    message = detail["msg"].removeprefix("Value error, ")
    if not location:
        return message
    return f"`{location}` = {detail['input']!r}: {message}"


def _known_keys(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    current: Any = model
    for part in location:
        current = _step_into(current, part)
    return sorted(current.model_fields) if _is_model(current) else []


def _step_into(annotation: Any, part: int | str) -> Any:
    if _is_model(annotation) and part in annotation.model_fields:
        return _model_within(annotation.model_fields[str(part)].annotation)
    return annotation


def _model_within(annotation: Any) -> Any:
    if _is_model(annotation):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_within(arg))), None)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
