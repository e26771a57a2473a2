"""OpenAPI 3.1 out of powerd.api: routes and types are written once, there.

House rules: pure; nothing about a route is written here that powerd.api does not say.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from powerd import __version__
from powerd.api import API_HEADER, API_VERSION, LEASE_TOKEN_HEADER, ErrorView
from powerd.errors import CODES
from powerd.routes import ROUTES, Route


def _content(schema: Any, media: str = "application/json") -> dict[str, Any]:
    return {media: {"schema": schema}} if schema is not None else {media: {}}


def _operation(route: Route, refs: dict[type, Any]) -> dict[str, Any]:
    schema: Any = None
    if route.response is not None:
        schema = {"type": "array", "items": refs[route.response]} if route.many else refs[route.response]
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "description": text, "schema": {"type": "string"}}
        for name, text in route.query.items()
    ]
    if route.path.startswith("/v1/leases/"):
        parameters.append({"name": LEASE_TOKEN_HEADER, "in": "header", "required": False, "schema": {"type": "string"}})
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "parameters": parameters,
        "responses": {
            "200": {"description": "Done", "content": _content(schema, route.media)},
            "default": {"description": "Nothing was changed", "content": _content({"$ref": "#/components/schemas/Error"})},
        },
    }
    if route.request is not None:
        operation["requestBody"] = {"required": True, "content": _content(refs[route.request])}
    return operation


def document() -> dict[str, Any]:
    """The whole API as an OpenAPI 3.1 document."""
    types = sorted({t for r in ROUTES for t in (r.request, r.response) if t is not None} | {ErrorView}, key=lambda t: t.__name__)
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    refs = dict(zip(types, schemas, strict=True))
    components = dict(components)
    components["Error"] = {"type": "object", "required": ["error"], "properties": {"error": refs[ErrorView]}}
    codes = "\n".join(f"- `{c.name}`: HTTP {c.http_status}, exit code {c.exit_code}, fault {c.fault}" for c in CODES.values())
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, refs)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "powerd",
            "version": f"{API_VERSION[0]}.{API_VERSION[1]}",
            "description": f"powerd {__version__}. Header `{API_HEADER}` states either side's version.\n\nError codes:\n{codes}",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components},
    }
