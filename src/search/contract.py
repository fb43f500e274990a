"""The API's contract: an OpenAPI 3.1 document, and the same as a page to read."""

from __future__ import annotations

from collections.abc import Collection
from html import escape
from typing import Any

from .query import DEFAULT_RESULTS, DEFAULT_WEIGHT, MAX_DEPTH, MAX_LETTERS, MAX_RESULTS, MAX_UPLOAD
from .thumbnails import SIDES

VERSION = "1"
_ERRORS = {
    "400": "a parameter or a body that cannot be used",
    "404": "no such row, page or collection",
    "413": f"more than {MAX_UPLOAD:,} bytes or too many pixels",
    "415": "not a picture in a format that is read",
    "503": "too many requests wait; Retry-After says when to come again",
}
_NUMBER, _TEXT, _WHOLE = {"type": "number"}, {"type": "string"}, {"type": "integer", "minimum": 0}
_ROW = {"name": "row", "in": "path", "required": True, "schema": _WHOLE, "description": "A row's number."}
_QUERY = [
    ("q", {"type": "string", "maxLength": MAX_LETTERS}, "Text to search for, in a language that the model knows."),
    ("row", _WHOLE, "Row whose picture is searched for."),
    (
        "weight",
        {"type": "number", "minimum": 0, "maximum": 1, "default": DEFAULT_WEIGHT},
        "The picture's share where a text is mixed with a picture or a row.",
    ),
    (
        "k",
        {"type": "integer", "minimum": 1, "maximum": MAX_RESULTS, "default": DEFAULT_RESULTS},
        "Results of this answer.",
    ),
    (
        "offset",
        {**_WHOLE, "default": 0},
        f"Results to leave out, for the next page; offset + k is at most {MAX_DEPTH:,}.",
    ),
]
_RESULT: dict[str, Any] = {
    "type": "object",
    "required": ["id", "row", "score", "image", "thumbnail", "text"],
    "properties": {
        "id": {"description": "The picture's name or number in its source."},
        "row": {**_WHOLE, "description": "Its number in this collection."},
        "score": {"type": ["number", "null"], "description": "Cosine similarity to the query; null without a query."},
        "image": {"type": "string", "description": "Address of the picture on this server."},
        "thumbnail": {
            "type": "string",
            "description": f"Address of the picture, small; ?side= takes {SIDES[0]} to {SIDES[1]}.",
        },
        "text": {"type": "string", "description": "Its caption, empty without one."},
    },
    "additionalProperties": {"description": "Further metadata, by name."},
}
_ANSWER = {
    "type": "object",
    "required": ["results", "total", "query", "milliseconds"],
    "properties": {
        "results": {"type": "array", "items": {"$ref": "#/components/schemas/Result"}, "description": "Best first."},
        "total": {**_WHOLE, "description": "Rows that were searched: all, or those that pass the filters."},
        "query": {"type": "object", "description": "The query as it was understood."},
        "milliseconds": {
            "type": "object",
            "properties": {name: _NUMBER for name in ("encode", "search", "describe", "total")},
        },
    },
}
_KNN = {
    "type": "object",
    "properties": {
        "text": _TEXT,
        "image": {"type": "string", "description": "A picture, base64."},
        "embedding_input": {"type": "array", "items": _NUMBER},
        "num_images": {
            "type": "integer",
            "default": 100,
            "maximum": MAX_RESULTS,
            "description": "Results with metadata.",
        },
        "num_result_ids": {"type": "integer", "maximum": MAX_DEPTH, "description": "Results in all."},
        "modality": {"enum": ["image"]},
        "indice_name": _TEXT,
    },
    "description": "Exactly one of text, image, embedding_input. image_url is refused: no address is fetched.",
}


def describe_api(fields: Collection[str]) -> dict[str, Any]:
    """The OpenAPI document. fields: those by which results can be filtered."""
    asked = [_parameter(name, schema, text) for name, schema, text in _QUERY]
    asked += [
        {**_parameter(name, {"type": "array", "items": _TEXT}, "Only rows with one of these values."), "explode": True}
        for name in fields
    ]
    file = {"picture": {"type": "string", "format": "binary"}, "text": _TEXT, "weight": _NUMBER}
    paths = {
        "/api/search": {
            "get": _operation("Search by a text, by a row, or by both", "Answer", asked),
            "post": {
                **_operation("Search by a picture, with or without a text", "Answer", asked),
                "requestBody": {
                    "required": True,
                    "content": {
                        "image/*": {"schema": {"type": "string", "format": "binary"}},
                        "multipart/form-data": {"schema": {"type": "object", "properties": file}},
                    },
                },
            },
        },
        "/api/picture/{row}": {"get": _operation("A row's picture", "image/*", [_ROW])},
        "/api/thumbnail/{row}": {"get": _operation("A row's picture, small", "image/jpeg", [_ROW, _side()])},
        "/api/about": {"get": _operation("Model, number of rows, fields with their values, texts to try", "object")},
        "/api/openapi.json": {"get": _operation("This contract as an OpenAPI document", "object")},
        "/knn-service": {"post": _operation("Search as clip-retrieval's clients ask", "array", body=_KNN)},
        "/metadata": {
            "post": _operation(
                "Metadata of rows as clip-retrieval's clients ask",
                "array",
                body={
                    "type": "object",
                    "properties": {"ids": {"type": "array", "items": _WHOLE}, "indice_name": _TEXT},
                },
            )
        },
        "/indices-list": {"get": _operation("Names of the collections: one", "array")},
    }
    error = {"type": "object", "required": ["error"], "properties": {"error": {**_TEXT, "description": "One line."}}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Image search",
            "version": VERSION,
            "description": "Search a collection of pictures by text, by picture, or by both.",
        },
        "paths": paths,
        "components": {"schemas": {"Answer": _ANSWER, "Result": _RESULT, "Error": error}},
    }


def _parameter(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": schema, "description": text}


def _side() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer", "minimum": SIDES[0], "maximum": SIDES[1], "default": 256}
    return _parameter("side", schema, "Pixels of the longer side.")


def _operation(
    summary: str, answer: str, parameters: list[dict[str, Any]] | None = None, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    if "/" in answer:
        content: dict[str, Any] = {answer: {"schema": {"type": "string", "format": "binary"}}}
    else:
        known = {"$ref": f"#/components/schemas/{answer}"} if answer[0].isupper() else {"type": answer}
        content = {"application/json": {"schema": known}}
    failed = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    responses |= {status: {"description": text, "content": failed} for status, text in _ERRORS.items()}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if parameters:
        operation["parameters"] = parameters
    if body:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation


def draw_contract(document: dict[str, Any]) -> str:
    """The document as an HTML page."""
    about, parts = document["info"], []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(_draw_operation(path, method, operation))
    rows = [(name, prop.get("description", "")) for name, prop in _RESULT["properties"].items()]
    parts.append(f"<section><h2>A result</h2>{_draw_table(rows)}</section>")
    parts.append(f'<section><h2>Errors</h2><p>{{"error": one line}} with</p>{_draw_table(_ERRORS.items())}</section>')
    example = (
        "curl 'http://localhost:8000/api/search?q=a+red+circle&amp;k=5'\n"
        "curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' 'http://localhost:8000/api/search?k=5'\n"
        "curl -F picture=@photo.jpg -F text='at night' -F weight=0.6 http://localhost:8000/api/search"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="/icon.svg"><link rel="stylesheet" href="/style.css"><title>API</title></head>'
        f'<body class="contract"><main><p><a href="/">Back to the search page</a></p><h1>{escape(about["title"])}: '
        f"the API</h1>"
        f'<p>{escape(about["description"])} As a document: <a href="/api/openapi.json">openapi.json</a>.</p>'
        f"<pre>{example}</pre>{''.join(parts)}</main></body></html>"
    )


def _draw_operation(path: str, method: str, operation: dict[str, Any]) -> str:
    rows = [(one["name"], one.get("description", "")) for one in operation.get("parameters", [])]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        rows.append((kind, schema.get("description") or ", ".join(schema.get("properties", {})) or "the body itself"))
    title = f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
    return f"<section>{title}<p>{escape(operation['summary'])}</p>{_draw_table(rows)}</section>"


def _draw_table(rows: Any) -> str:
    cells = "".join(f"<tr><th><code>{escape(name)}</code></th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{cells}</table>" if cells else ""
