"""Documents of an enrolment as they travel: JSON that holds no secret, its bytes in base64, its size bounded."""

from __future__ import annotations

import base64
from typing import Annotated, TypeVar

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError

from shared.errors import RefusedError
from shared.manifest import WireModel, describe_invalid
from shared.messages import MAX_GRANT_BYTES
from shared.trust.signing import KEY_BYTES, SIGNATURE_BYTES

MAX_DOCUMENT_BYTES = MAX_GRANT_BYTES


def _decode(value: object) -> object:
    return base64.b64decode(value, validate=True) if isinstance(value, str) else value


Base64 = Annotated[
    bytes,
    BeforeValidator(_decode),
    PlainSerializer(lambda data: base64.b64encode(data).decode(), return_type=str, when_used="json"),
]
Key = Annotated[Base64, Field(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Signature = Annotated[Base64, Field(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]

_D = TypeVar("_D", bound=WireModel)


def parse_json(kind: type[_D], data: bytes, what: str) -> _D:
    """Return the document that `data` is; RefusedError(rule='bad-document') when it is none of that kind."""
    if len(data) > MAX_DOCUMENT_BYTES:
        raise RefusedError(f"a {what} of {len(data)} bytes", rule="bad-document")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise RefusedError(describe_invalid(what, error), rule="bad-document") from None


def to_json(document: WireModel) -> bytes:
    """The document as it travels."""
    return document.model_dump_json(indent=2).encode() + b"\n"
