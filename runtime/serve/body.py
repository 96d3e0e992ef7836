"""The bodies of requests: strict JSON, and errors that name the field."""

from __future__ import annotations

import json
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, FailFast, ValidationError

from lfx.checks import parse_json
from lfx.runtime.serve.replies import RefusalError, too_many_inputs
from lfx.runtime.serve.service import Service

_LONGEST_MESSAGE = 300
_SMALL_BYTES = 32_768  # parsed in less than a millisecond, so that other requests need not wait for it


class Body(BaseModel):
    """The JSON body of a request. Values are not converted: "1" is no number. Unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class StrictBody(Body):
    """A body in which an unknown field is an error."""

    model_config = ConfigDict(strict=True, extra="forbid")


AnyBody = TypeVar("AnyBody", bound=Body)
Item = TypeVar("Item")


class _FailFast(FailFast):
    """pydantic's FailFast with a hash, which a union of types needs."""

    __hash__ = object.__hash__


# A list whose check ends at its first wrong item: a million wrong items would give a million errors.
List = Annotated[list[Item], _FailFast()]


async def read_body(service: Service, data: bytes, form: type[AnyBody]) -> AnyBody:
    """`parse_body`, in the thread that tokenizes if the body is large."""
    if len(data) <= _SMALL_BYTES:
        return parse_body(data, form, service.settings.max_inputs)
    return await service.parse(lambda: parse_body(data, form, service.settings.max_inputs))


def parse_body(data: bytes, form: type[AnyBody], max_inputs: int) -> AnyBody:
    """Parse and check a body.

    Raises:
        RefusalError: it is not JSON, has too many inputs, or does not match `form`; then the message names the first
            wrong field.
    """
    try:
        value = parse_json(data.decode("utf-8-sig"))  # json.loads would take UTF-16 and UTF-32 too
    except json.JSONDecodeError as error:
        raise RefusalError(422, f"the body is not JSON: {error.msg} at character {error.pos}") from error
    except ValueError as error:
        raise RefusalError(422, f"the body is not JSON: {str(error)[:_LONGEST_MESSAGE]}") from error
    if not isinstance(value, dict):
        raise RefusalError(422, f"the body is {type(value).__name__}; give a JSON object")
    # Counted before they are checked, which takes seconds for hundreds of thousands, in which no other thread runs. A
    # list of two may be a pair of texts, and one of numbers the ids of one input.
    for inputs in (value.get("inputs"), value.get("input")):
        if isinstance(inputs, list) and len(inputs) > max(max_inputs, 2) and not isinstance(inputs[0], int):
            raise too_many_inputs(len(inputs), max_inputs)
    try:
        return form.model_validate(value)
    except ValidationError as error:
        raise RefusalError(422, _explain(error, form)) from error


def _explain(error: ValidationError, form: type[Body]) -> str:
    """Describe the first error, after the name of the field.

    For a field of several types pydantic reports one error per type, so the field's description is given instead. The
    fields of an object in the body have names such as parameters.top_k.
    """
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part) for part in first["loc"]]
    if not path or not path[0]:
        return f"the body: {first['msg']}"[:_LONGEST_MESSAGE]
    field = form.model_fields.get(path[0])
    inner = _object_of(field.annotation) if field is not None else None
    if inner is not None and len(path) > 1:
        name, field = ".".join(path[:2]), inner.model_fields.get(path[1])
        if field is None:
            return f"{name} is not supported; leave it out"[:_LONGEST_MESSAGE]
        message = f"{first['msg']}; {field.description}"
    else:
        name, message = path[0], first["msg"]
        if field is not None and first["type"] != "missing" and field.description:
            message = field.description
    return f"{name}: {message}"[:_LONGEST_MESSAGE]


def _object_of(annotation: Any) -> type[Body] | None:
    """The form of a field that is an object or null; None for other fields."""
    options = [option for option in get_args(annotation) if option is not NoneType]
    is_form = len(options) == 1 and isinstance(options[0], type) and issubclass(options[0], Body)
    return options[0] if is_form else None


def request_body(form: type[Body], examples: dict[str, Any]) -> dict[str, Any]:
    """Describe a body in OpenAPI, for `openapi_extra` of a route that parses its body itself.

    Args:
        examples: title of an example -> the example.
    """
    schema = _inlined(form.model_json_schema())
    described = {name: {"summary": name, "value": value} for name, value in examples.items()}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema, "examples": described}}}
    }


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Replace each $ref of a JSON schema by its definition; no definition contains itself."""
    definitions = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return inline(definitions[value["$ref"].rsplit("/", 1)[-1]])
            return {key: inline(item) for key, item in value.items()}
        return [inline(item) for item in value] if isinstance(value, list) else value

    inlined: dict[str, Any] = inline(schema)
    return inlined
