"""``/docs``: the API's reference as one page of plain HTML, from its schema.

FastAPI's own pages load their scripts from another site, which the content security policy forbids, and which a
machine without internet could not do.
"""

from __future__ import annotations

from html import escape
from typing import Any

_METHODS = ("get", "post", "put", "patch", "delete")


def reference_page(schema: dict[str, Any]) -> str:
    """Returns the page for an OpenAPI 3.1 schema."""
    info = schema["info"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'><meta name=color-scheme content='light dark'>",
        f"<title>{escape(info['title'])} API</title>",
        f"<h1>{escape(info['title'])} API {escape(info['version'])}</h1>",
        "".join(f"<p>{_code(p)}</p>" for p in info["description"].strip().split("\n\n")),
        "<p>The schema itself: <a href='/openapi.json'>/openapi.json</a>. All but the health checks want",
        " <code>Authorization: Bearer TOKEN</code>.</p>",
    ]
    for tag in schema["tags"]:
        parts.append(f"<h2>{escape(tag['name'].capitalize())}</h2><p>{escape(tag['description'])}</p>")
        for path, item in schema["paths"].items():
            for method in _METHODS:
                if method in item and tag["name"] in item[method].get("tags", []):
                    parts.append(_operation(f"{method.upper()} {path}", item[method]))
        for name, item in schema.get("webhooks", {}).items():
            if tag["name"] in item["post"].get("tags", []):
                parts.append(_operation(name, item["post"]))
    parts.append("<h2>Types</h2>")
    for name, model in sorted(schema["components"]["schemas"].items()):
        parts.append(_model(name, model))
    return "\n".join(parts)


def _code(text: str) -> str:
    pieces = escape(text).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(pieces))


def _operation(title: str, operation: dict[str, Any]) -> str:
    parts = [f"<h3><code>{escape(title)}</code></h3><p>{_code(operation.get('summary', ''))}</p><ul>"]
    for p in operation.get("parameters", []):
        required = "" if p.get("required") else " (optional)"
        parts.append(
            f"<li>{escape(p['in'])} <code>{escape(p['name'])}</code>: {_type(p['schema'])}{required} "
            f"{_code(p.get('description', ''))}</li>"
        )
    if body := operation.get("requestBody"):
        parts.append(f"<li>body: {_content(body)}</li>")
    for status, response in operation.get("responses", {}).items():
        parts.append(f"<li>{escape(status)} {escape(response['description'])}: {_content(response)}</li>")
    parts.append("</ul>")
    return "".join(parts)


def _content(of: dict[str, Any]) -> str:
    return ", ".join(_type(c.get("schema", {})) for c in of.get("content", {}).values()) or "nothing"


def _model(name: str, model: dict[str, Any]) -> str:
    parts = [f"<h3 id='{escape(name)}'>{escape(name)}</h3><p>{_code(model.get('description', ''))}</p><ul>"]
    if "enum" in model:
        parts.append(f"<li>{escape(', '.join(map(str, model['enum'])))}</li>")
    for field, schema in model.get("properties", {}).items():
        parts.append(f"<li><code>{escape(field)}</code>: {_type(schema)} {_code(schema.get('description', ''))}</li>")
    parts.append("</ul>")
    return "".join(parts)


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f"<a href='#{name}'>{name}</a>"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(_type(s) for s in schema[key])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if "const" in schema:
        return f"<code>{escape(str(schema['const']))}</code>"
    if "enum" in schema:
        return escape(" or ".join(map(str, schema["enum"])))
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict) and extra:
        return f"map to {_type(extra)}"
    return escape(str(schema.get("type", "anything")))
