"""The search server's API: what is answered, what is refused and how, and twenty users at once."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="pip install -e '.[search]'")
pytest.importorskip("uvicorn", reason="pip install -e '.[search]'")
pytest.importorskip("httpx2", reason="starlette's test client needs it: pip install httpx2")
from starlette import testclient

from helpers.search_collection import Encoder, make_collection, make_picture, running
from rwkv_clip.search import application as application_module
from rwkv_clip.search import server as server_module
from rwkv_clip.search import service as service_module
from rwkv_clip.search.application import build_app
from rwkv_clip.search.batching import Batcher
from rwkv_clip.search.multipart import read_parts
from rwkv_clip.search.query import MAX_DEPTH, MAX_LETTERS, MAX_RESULTS, RequestError
from rwkv_clip.search.thumbnails import Thumbnails

ROWS = 60
HOSTILE = "<img src=x onerror=alert(1)>\"'\\ \u202e\ud800\x00"


@pytest.fixture(scope="module")
def collection():
    return make_collection(
        ROWS,
        size=96,
        changes={
            5: {
                "id": HOSTILE,
                "fields": {"background": "sky", "things": 2, "note": HOSTILE, "score": 7, "nan": np.nan},
            },
            6: {"text": ""},
        },
    )


@pytest.fixture(scope="module")
def client(collection):
    with testclient.TestClient(build_app(collection), base_url="http://localhost") as client:
        yield client


def answer(response, status=200):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    content = response.json()
    if status >= 400:
        assert list(content) == ["error"] and content["error"] and "\n" not in content["error"]
        return content["error"]
    return content


def rows_of(content):
    return [result["row"] for result in content["results"]]


# ---- what is answered ------------------------------------------------------------------------------------------------


def test_a_caption_finds_its_row(client, collection):
    for row in (0, 17, ROWS - 1):
        found = answer(client.get("/api/search", params={"q": collection.describe(row)["text"], "k": 3}))
        first = found["results"][0]
        assert first["row"] == row and first["id"] == collection.describe(row)["id"]
        assert first["text"] == collection.describe(row)["text"]
        assert first["image"] == f"/api/picture/{row}" and first["thumbnail"] == f"/api/thumbnail/{row}"
        assert first["background"] == collection.describe(row)["fields"]["background"]
        assert len(found["results"]) == 3 and found["total"] == ROWS
        scores = [result["score"] for result in found["results"]]
        assert scores == sorted(scores, reverse=True)
        assert {"encode", "search", "describe", "total"} == set(found["milliseconds"])
        assert found["query"]["text"] == collection.describe(row)["text"]


def test_pages_of_results_are_one_list(client):
    whole = rows_of(answer(client.get("/api/search?q=red+circle&k=50")))
    parts = [rows_of(answer(client.get(f"/api/search?q=red+circle&k=20&offset={at}"))) for at in (0, 20, 40)]
    assert [row for part in parts for row in part][:50] == whole and len(parts[-1]) == 20
    assert rows_of(answer(client.get(f"/api/search?q=red+circle&k=20&offset={ROWS}"))) == []


def test_without_a_query_rows_come_in_their_order(client):
    found = answer(client.get("/api/search?k=4&offset=2"))
    assert rows_of(found) == [2, 3, 4, 5] and {result["score"] for result in found["results"]} == {None}


def test_a_row_finds_itself_and_a_picture_finds_its_row(client, collection):
    assert rows_of(answer(client.get("/api/search?row=9&k=3")))[0] == 9
    picture = collection.picture(9)
    raw = client.post("/api/search?k=3", content=picture, headers={"content-type": "image/jpeg"})
    form = client.post("/api/search", files={"picture": (HOSTILE[:20], picture)}, data={"k": "3"})
    assert rows_of(answer(raw)) == rows_of(answer(form)) and rows_of(answer(raw))[0] == 9
    assert answer(form)["query"]["picture"] is True


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("way", ["row", "picture"])
def test_a_mixture_is_the_renormalised_sum(client, collection, weight, way):
    text, row = "a plain green star", 9
    said = collection.model.encode_text(text).astype(np.float64)
    if way == "row":
        seen = collection.vectors.take([row])[0].astype(np.float64)
        found = answer(client.get("/api/search", params={"q": text, "row": row, "weight": weight, "k": 10}))
    else:
        seen = collection.model.encode_picture(collection.picture(row)).astype(np.float64)
        files = {"picture": ("a.jpg", collection.picture(row))}
        found = answer(client.post("/api/search", files=files, data={"text": text, "weight": weight, "k": 10}))
    mixed = (1 - weight) * said + weight * seen
    rows, scores = collection.vectors.search((mixed / np.linalg.norm(mixed)).astype(np.float32)[None], 10)
    assert rows_of(found) == rows[0].tolist()
    assert [result["score"] for result in found["results"]] == pytest.approx(scores[0].tolist(), abs=1e-5)


def test_filters(client, collection):
    def fields(row):
        return collection.describe(row)["fields"]

    sky = [row for row in range(ROWS) if fields(row)["background"] == "sky"]
    found = answer(client.get(f"/api/search?q=red&background=sky&k={ROWS}"))
    assert sorted(rows_of(found)) == sky and found["total"] == len(sky)
    both = [row for row in range(ROWS) if fields(row)["background"] in ("sky", "sand") and fields(row)["things"] == 2]
    found = answer(client.get(f"/api/search?background=sky&background=sand&things=2&k={ROWS}"))
    assert rows_of(found) == both
    assert answer(client.get("/api/search?q=red&background=nowhere"))["results"] == []
    assert "backgroun: no such parameter" in answer(client.get("/api/search?backgroun=sky"), 400)


def test_metadata_is_json_and_hides_nothing(client):
    result = answer(client.get("/api/search?offset=5&k=1"))["results"][0]
    assert result["id"].startswith(HOSTILE[:20]) and "onerror" in result["note"]
    assert result["score"] is None and result["nan"] is None  # the field of that name does not replace the score


def test_about(client):
    about = answer(client.get("/api/about"))
    assert about["rows"] == ROWS and about["name"] == "demo" and about["model"] == "runs/stand-in"
    assert {one["value"] for one in about["fields"]["background"]} >= {"sky", "sand"}
    assert sum(one["count"] for one in about["fields"]["background"]) == ROWS
    assert about["examples"] and all(isinstance(text, str) for text in about["examples"])


def test_pictures_and_thumbnails(client, collection):
    picture = client.get("/api/picture/3")
    assert picture.content == collection.picture(3) and picture.headers["content-type"] == "image/jpeg"
    for side in (32, 64, 96, 400):
        small = client.get(f"/api/thumbnail/3?side={side}")
        assert max(Image.open(io.BytesIO(small.content)).size) == min(side, 96)
        assert small.headers["cache-control"] == "no-cache"
    assert "not a row" in answer(client.get(f"/api/picture/{ROWS}"), 404)


def test_pictures_are_kept_as_long_as_the_rows_are_the_same(client, collection):
    version = answer(client.get("/api/about"))["version"]
    for path in ("/api/picture/3", "/api/thumbnail/3"):
        assert "max-age" in client.get(f"{path}?v={version}").headers["cache-control"]
        assert client.get(f"{path}?v=other").headers["cache-control"] == "no-cache"
    with testclient.TestClient(build_app(collection), base_url="http://localhost") as restarted:
        assert answer(restarted.get("/api/about"))["version"] != version


def test_a_picture_that_cannot_be_read_names_no_file():
    broken = make_collection(8, size=32)
    broken._pictures[2] = b"not a picture"
    broken._pictures[3] = b""
    with testclient.TestClient(build_app(broken), base_url="http://localhost") as client:
        for path in ("/api/thumbnail/2", "/api/thumbnail/3", "/api/picture/3"):
            assert answer(client.get(path), 404) == "this row's picture cannot be read"


def test_clip_retrievals_names(client, collection):
    text = collection.describe(4)["text"]
    asked = {"text": text, "image": None, "image_url": None, "embedding_input": None, "modality": "image"}
    asked |= {"num_images": 2, "num_result_ids": 7, "indice_name": "demo", "deduplicate": True, "use_mclip": False}
    found = answer(client.post("/knn-service", json=asked))
    assert found[0]["id"] == 4 and found[0]["caption"] == text and found[0]["similarity"] > found[1]["similarity"]
    assert found[0]["url"] == "http://localhost/api/picture/4"
    assert [("caption" in one) for one in found] == [True, True] + 5 * [False]
    by_row = rows_of(answer(client.get("/api/search", params={"q": text, "k": 7})))
    assert [one["id"] for one in found] == by_row
    picture = base64.b64encode(collection.picture(4)).decode()
    assert answer(client.post("/knn-service", json={"image": picture, "num_images": 1}))[0]["id"] == 4
    vector = collection.vectors.take([4])[0].tolist()
    assert answer(client.post("/knn-service", json={"embedding_input": vector, "num_images": 1}))[0]["id"] == 4
    assert answer(client.get("/indices-list")) == ["demo"]
    told = answer(client.post("/metadata", json={"ids": [4, 0], "indice_name": "demo"}))
    assert [one["id"] for one in told] == [4, 0] and told[0]["metadata"]["text"] == text


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/knn-service", {"image_url": "http://169.254.169.254/"}, 400, "fetches no addresses"),
        ("/knn-service", {}, 400, "exactly one"),
        ("/knn-service", {"text": "a", "image": "aa"}, 400, "exactly one"),
        ("/knn-service", {"text": 5}, 400, "text"),
        ("/knn-service", {"text": "a", "modality": "text"}, 400, "modality"),
        ("/knn-service", {"text": "a", "num_images": 10**9}, 400, "num_images"),
        ("/knn-service", {"text": "a", "num_images": True}, 400, "num_images"),
        ("/knn-service", {"text": "a", "num_result_ids": MAX_DEPTH + 1}, 400, "num_result_ids"),
        ("/knn-service", {"text": "a", "indice_name": "../../etc"}, 404, "indice_name"),
        ("/knn-service", {"image": "!!"}, 400, "base64"),
        ("/knn-service", {"image": base64.b64encode(b"nothing").decode()}, 415, "not a picture"),
        ("/knn-service", {"embedding_input": [1, 2]}, 400, "2 numbers"),
        ("/knn-service", {"embedding_input": [0] * 256}, 400, "direction"),
        ("/knn-service", {"embedding_input": ["1"] * 256}, 400, "not a number"),
        ("/knn-service", {"embedding_input": [10**400]}, 400, "too large"),
        ("/knn-service", [1], 400, "no JSON object"),
        ("/metadata", {"ids": [-1]}, 404, "not a row"),
        ("/metadata", {"ids": [True]}, 404, "not a row"),
        ("/metadata", {"ids": "all"}, 400, "ids"),
        ("/metadata", {"ids": [0] * (MAX_DEPTH + 1)}, 400, "ids"),
    ],
)
def test_clip_retrievals_requests_are_checked(client, path, body, status, said):
    assert said in answer(client.post(path, json=body), status)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"text": ' + b"[" * 100_000, b'{"embedding_input": [NaN]}'])
def test_broken_json(client, body):
    answer(client.post("/knn-service", content=body), 400)


# ---- what is refused -------------------------------------------------------------------------------------------------

PATHS = ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "....//etc/passwd"]
PATHS += [
    "..\\..\\windows\\win.ini",
    "0%00.jpg",
    "file:///etc/passwd",
    "-1",
    "+1",
    "1.0",
    "1e1",
    "٣",
    "0x1",
    " 1",
    "9" * 5000,
]


@pytest.mark.parametrize("value", PATHS)
@pytest.mark.parametrize("place", ["picture", "thumbnail", "page", "row", "k", "offset", "weight", "side", "filter"])
def test_no_parameter_is_a_path(client, place, value):
    path = {
        "picture": f"/api/picture/{value}",
        "thumbnail": f"/api/thumbnail/{value}",
        "page": f"/{value}",
        "side": f"/api/thumbnail/1?side={value.replace('+', '%2B')}",
        "filter": f"/api/search?background={value}",
    }.get(place, f"/api/search?q=red&{place}={value.replace('+', '%2B')}")
    response = client.get(path)
    content = response.text
    assert "root:" not in content and "Traceback" not in content
    if place == "filter":
        assert answer(response)["results"] == []
    elif not (place == "weight" and value in ("1.0", " 1", "+1", "٣")):
        assert response.status_code in (400, 404) and len(answer(response, response.status_code)) < 300


def test_long_texts(client, collection):
    long = "red circle " * 455  # 5,005 letters
    assert len(answer(client.get("/api/search", params={"q": long, "k": 3}))["results"]) == 3
    assert f"more than {MAX_LETTERS:,}" in answer(client.get("/api/search", params={"q": "a" * (MAX_LETTERS + 1)}), 400)
    told = answer(client.get("/api/search", params={"x" * 9000: "1"}), 400)
    assert len(told) < 300  # what a client sent comes back shortened
    with running(collection) as url:  # nine bytes of an address for each letter
        with urllib.request.urlopen(f"{url}/api/search?k=3&q={'%E5%9B%BE' * MAX_LETTERS}", timeout=20) as response:
            assert len(json.load(response)["results"]) == 3
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(f"{url}/api/search?q={'%E5%9B%BE' * 3 * MAX_LETTERS}", timeout=20)


@pytest.mark.parametrize(
    "text", [HOSTILE.replace("\ud800", ""), "' OR 1=1 --", "\x00", "%00", "😀" * 50, "\u200b", "{{7*7}}"]
)
def test_texts_of_any_content(client, text):
    found = answer(client.get("/api/search", params={"q": text, "k": 2}))
    assert len(found["results"]) == 2 and found["query"].get("text", "") == text.strip()


@pytest.mark.parametrize(
    "parameters",
    [
        *("k=0", f"k={MAX_RESULTS + 1}", "k=a", "k=-1", f"offset={MAX_DEPTH}", f"row={ROWS}", "row=-1"),
        *("weight=2", "weight=nan", "weight=-0.1", "weight=x", "q=a&q=b", "k=1&k=1", "nonsense=1", "__proto__=1"),
        "&".join(f"background={i}" for i in range(65)),
    ],
)
def test_parameters_are_checked(client, parameters):
    answer(client.get(f"/api/search?q=red&{parameters}"), 400)


def make_bomb(width, height):
    """A PNG of a few bytes that says it has width x height pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"hello", 415),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", 415),
        (b"\xff\xd8\xff\xe0", 415),
        (make_bomb(60_000, 60_000), 413),
        (make_bomb(9_000, 9_000), 413),
        (make_bomb(40_000, 1), 413),
        (make_picture()[:60], 415),
        (bytes(32_000_001), 413),
    ],
    ids=["empty", "text", "svg", "eps", "cut jpeg", "3.6 gigapixels", "81 megapixels", "wide", "cut png", "32 MB"],
)
def test_bodies_that_are_no_pictures(client, body, status):
    answer(client.post("/api/search", content=body, headers={"content-type": "image/png"}), status)
    if body:
        answer(client.post("/api/search", files={"picture": ("a.png", body)}), status)


def test_a_body_of_no_known_length_is_read_to_the_limit(client):
    pieces = (bytes(1 << 20) for _ in range(64))
    answer(client.post("/api/search", content=pieces, headers={"content-type": "image/png"}), 413)
    answer(client.post("/metadata", content=iter([b" " * (1 << 20), b" " * 9])), 413)


MULTIPART = "multipart/form-data; boundary=mark"
HEAD = b'Content-Disposition: form-data; name="picture"; filename="a"\r\n\r\n'


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"--mark\r\n"),
        ("multipart/form-data; boundary=", b"--mark\r\n"),
        (MULTIPART, b""),
        (MULTIPART, b"--mark--"),
        (MULTIPART, b"--mark\r\n" + HEAD + b"abc"),
        (MULTIPART, b"--mark\r\n" + HEAD + b"abc\r\n--mark"),
        (MULTIPART, b"--mark\r\nX: 1\r\n\r\nabc\r\n--mark--"),
        (MULTIPART, b"--mark\r\nabc\r\n--mark--"),
        (MULTIPART, b"--mark\r\nX: " + b"a" * 9000 + b"\r\n" + HEAD + b"abc\r\n--mark--"),
        (MULTIPART, (b"--mark\r\n" + HEAD + b"a\r\n") * 101 + b"--mark--"),
        (MULTIPART, (b"--mark\r\n" + HEAD + b"a\r\n") * 2 + b"--mark--"),
        (MULTIPART, b'--mark\r\nContent-Disposition: form-data; name="../x"\r\n\r\n1\r\n--mark--\r\n'),
    ],
)
def test_broken_forms(client, kind, body):
    answer(client.post("/api/search", content=body, headers={"content-type": kind}), 400)


def test_parts_of_a_form():
    inner = b"--mark\r\n--other\r\n\r\n--mar"
    body = b"preamble\r\n--mark\r\ncontent-disposition: form-data; NAME=a; filename*=utf-8''b\"c\r\n\r\n" + inner
    body += b'\r\n--mark  \r\nX: y\r\nContent-Disposition: form-data; name="\xe5\x9b\xbe \\" x"\r\n\r\n\r\n'
    body += b"--mark--\r\nepilogue"
    with pytest.raises(RequestError):
        read_parts('multipart/form-data; boundary="mark"', body)  # the mark stands within the file
    parts = read_parts('multipart/form-data; boundary="mark"', body.replace(inner, b"--marked--"))
    assert [(part.name, part.data, part.is_file) for part in parts] == [
        ("a", b"--marked--", True),
        ('图 \\" x', b"", False),
    ]


def test_other_bodies(client):
    for kind in ("application/json", "application/x-www-form-urlencoded"):
        answer(client.post("/api/search", content=b"q=1", headers={"content-type": kind}), 415)
    assert "one of the two" in answer(client.post("/api/search?row=1", content=make_picture()), 400)
    answer(client.request("DELETE", "/api/search"), 405)
    answer(client.post("/api/about"), 405)
    answer(client.get("/nowhere"), 404)


# ---- who may ask -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/api", "/api/search?q=a", "/api/picture/0", "/page.js", "/nowhere", "/api/picture/x"]
)
def test_every_answer_is_guarded(client, path):
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert "http" not in policy and "*" not in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin" and "access-control-allow-origin" not in headers
    assert "server" not in headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((name, 200) for name in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:80", "LOCALHOST")),
        *((name, 421) for name in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "a@localhost", "")),
        *((name, 421) for name in ("[::1", "search.internal")),
    ],
)
def test_names_of_a_server_on_loopback(client, host, status):
    assert client.get("/api/about", headers={"host": host}).status_code == status


def test_names_of_an_open_server(collection):
    with testclient.TestClient(build_app(collection, host="0.0.0.0"), base_url="http://any.example") as client:
        assert client.get("/api/about").status_code == 200
    named = build_app(collection, allow_host=["Search.internal"])
    with testclient.TestClient(named, base_url="http://search.internal") as client:
        assert client.get("/api/about").status_code == 200


def test_origins(client, collection):
    evil, friend = {"origin": "https://evil.example"}, {"origin": "https://friend.example"}
    assert "may not call" in answer(client.post("/api/search", content=make_picture(), headers=evil), 403)
    assert client.get("/api/about", headers={"origin": "null"}).status_code == 403
    assert client.get("/api/about", headers={"origin": "http://localhost"}).status_code == 200
    app = build_app(collection, allow_origin=["https://friend.example"])
    with testclient.TestClient(app, base_url="http://localhost") as open_client:
        told = open_client.get("/api/about", headers=friend)
        assert told.status_code == 200 and told.headers["access-control-allow-origin"] == "https://friend.example"
        assert open_client.get("/api/about", headers=evil).status_code == 403
    with pytest.raises(ValueError, match="allow_origin"):
        build_app(collection, allow_origin=["friend.example"])


def test_the_contract(client):
    document = answer(client.get("/api/openapi.json"))
    assert document["openapi"].startswith("3.")
    names = [parameter["name"] for parameter in document["paths"]["/api/search"]["get"]["parameters"]]
    assert names == ["q", "row", "weight", "k", "offset", "background", "things", "note", "score", "nan"]
    result = answer(client.get("/api/search?q=red&k=1"))["results"][0]
    assert set(document["components"]["schemas"]["Result"]["required"]) <= set(result)
    for path, operations in document["paths"].items():
        for method in operations:
            assert client.request(method, path.replace("{row}", "0")).status_code in (200, 400), (method, path)
    page = client.get("/api").text
    assert all(path in page for path in document["paths"])


def test_the_page_uses_nothing_from_outside(client):
    html = client.get("/").text
    links = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert links and all(link.startswith("/") and not link.startswith("//") for link in links)
    for link in {"/style.css", "/page.js", "/words.js", "/icon.svg"}:
        text = client.get(link).text
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) and "@import" not in text
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text
    assert "style=" not in html and "onclick" not in html
    tag = client.get("/").headers["etag"]
    assert client.get("/", headers={"if-none-match": tag}).status_code == 304


# ---- many at once ----------------------------------------------------------------------------------------------------


def test_twenty_users(collection):
    texts = [collection.describe(row)["text"] for row in range(10, 30)]
    vectors = np.stack([collection.model.encode_text(text) for text in texts])
    expected = collection.vectors.search(vectors, 5)[0].tolist()

    def ask(url, row):
        request = f"{url}/api/search?{'&'.join(['k=5', 'q=' + texts[row].replace(' ', '+')])}"
        found = []
        for _ in range(5):
            with urllib.request.urlopen(request, timeout=30) as response:
                found.append(rows_of(json.load(response)))
        return found

    with running(collection) as url, ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask, [url] * 20, range(20))) == [[rows] * 5 for rows in expected]


def test_too_many_are_told_to_come_again(collection, monkeypatch):
    monkeypatch.setattr(service_module, "MOST_SEARCHES", 2)
    gate = threading.Event()

    class Slow(Encoder):
        def encode_text(self, text):
            gate.wait(30)
            return super().encode_text(text)

    monkeypatch.setattr(collection, "model", Slow())

    def ask(url):
        try:
            with urllib.request.urlopen(f"{url}/api/search?q=red", timeout=30) as response:
                return response.status, None
        except urllib.error.HTTPError as error:
            return error.code, error.headers["Retry-After"]

    with running(collection) as url, ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, url) for _ in range(6)]
        end = time.monotonic() + 30
        while sum(one.done() for one in asked) < 4 and time.monotonic() < end:
            time.sleep(0.01)
        with urllib.request.urlopen(f"{url}/api/thumbnail/0", timeout=30) as response:
            assert response.status == 200  # pictures have a room of their own
        gate.set()
        assert sorted(one.result() for one in asked) == [(200, None)] * 2 + [(503, "1")] * 4
        assert ask(url) == (200, None)


def test_slow_and_ended_bodies(collection, monkeypatch):
    monkeypatch.setattr(application_module, "PATIENCE", 0.3)
    monkeypatch.setattr(application_module, "MOST_UPLOADS", 1)
    head = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    with running(collection) as url:
        address = (urlsplit(url).hostname, urlsplit(url).port)
        with socket.create_connection(address, 10) as slow:
            slow.sendall(head + b"abc")
            time.sleep(0.1)
            with socket.create_connection(address, 10) as second:
                second.sendall(head + b"abc")
                assert b"503" in second.recv(4096).splitlines()[0]
            assert b"408" in slow.recv(4096).splitlines()[0]
        with socket.create_connection(address, 10) as gone:
            gone.sendall(head + b"abc")
        with socket.create_connection(address, 10) as large:
            large.sendall(head.replace(b"1000", b"999999999999"))
            assert b"413" in large.recv(4096).splitlines()[0]
        with urllib.request.urlopen(f"{url}/api/search?q=red", timeout=10) as response:
            assert response.status == 200


@pytest.mark.parametrize("began", [b"", b"GET /api/search?q=", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"])
@pytest.mark.parametrize("dribbles", [False, True])
def test_heads_that_do_not_come_whole(collection, monkeypatch, began, dribbles):
    """None at all, one that stays half, and after an answer the next one."""
    monkeypatch.setattr(server_module, "PATIENCE", 0.2)
    with running(collection) as url, socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 10) as slow:
        slow.sendall(began)
        slow.settimeout(0.05)
        said, end = [b"-"], time.monotonic() + 20
        while said[-1] and time.monotonic() < end:
            try:
                if dribbles:
                    slow.sendall(b"G")
                said.append(slow.recv(65536))
            except TimeoutError:
                continue
            except OSError:  # cut off
                said.append(b"")
        assert said[-1] == b"" and (b"200" in said[1].splitlines()[0] if b"Host" in began else len(said) == 2)


def test_an_answer_that_nobody_reads(collection, monkeypatch):
    monkeypatch.setattr(server_module, "PATIENCE", 0.2)
    monkeypatch.setattr(collection, "picture", lambda row, side=0: b"\xff\xd8\xff" + bytes(30_000_000))
    lost = threading.Event()
    end_of = server_module.Connection.connection_lost
    monkeypatch.setattr(server_module.Connection, "connection_lost", lambda *given: (end_of(*given), lost.set()))
    ask = b"GET /api/picture/0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with running(collection) as url:
        address = (urlsplit(url).hostname, urlsplit(url).port)
        with socket.create_connection(address, 10) as idle:
            idle.sendall(ask)
            assert lost.wait(20)
        lost.clear()
        with socket.create_connection(address, 10) as slow:  # but goes on
            slow.sendall(ask)
            taken = 0
            while part := slow.recv(500_000):
                taken += len(part)
                time.sleep(0.02)
            assert taken > 30_000_000


def test_answers_may_take_their_time(collection, monkeypatch):
    monkeypatch.setattr(server_module, "PATIENCE", 0.1)
    monkeypatch.setattr(collection, "model", Encoder(delay=1.0))
    with running(collection) as url, urllib.request.urlopen(f"{url}/api/search?q=red", timeout=10) as response:
        assert response.status == 200


def test_a_bug_is_one_line_and_the_server_lives(collection, monkeypatch, caplog):
    class Wrong(Encoder):
        def encode_text(self, text):
            raise RuntimeError("/secret/path")

    monkeypatch.setattr(collection, "model", Wrong())
    app = build_app(collection)
    with testclient.TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        assert "secret" not in answer(client.get("/api/search?q=red"), 500)
        assert "secret" in caplog.text
        monkeypatch.setattr(collection, "model", None)
        assert "--checkpoint" in answer(client.get("/api/search?q=red"), 501)
        assert rows_of(answer(client.get("/api/search?row=3&k=1"))) == [3]


def test_searches_that_wait_share_a_pass():
    started, go, sizes = threading.Event(), threading.Event(), []

    def search(vectors, count, allowed):
        sizes.append((len(vectors), count, allowed))
        started.set()
        go.wait(10)
        if allowed == "wrong":
            raise ValueError("wrong")
        return np.tile(np.arange(count), (len(vectors), 1)), vectors[:, :1].repeat(count, 1)

    batcher = Batcher(search, most=4)
    first = batcher.submit(np.zeros(2), 1)
    assert started.wait(10)
    later = [batcher.submit(np.full(2, i), 1 + i % 2, None) for i in range(3)]
    wrong = batcher.submit(np.zeros(2), 1, "wrong")
    cancelled = batcher.submit(np.zeros(2), 9)
    assert cancelled.cancel()
    go.set()
    assert first.result(10)[0].tolist() == [0]
    for number, one in enumerate(later):
        rows, scores = one.result(10)
        assert len(rows) == 1 + number % 2 and set(scores) == {number}
    with pytest.raises(ValueError, match="wrong"):
        wrong.result(10)
    assert sizes == [(1, 1, None), (3, 2, None), (1, 1, "wrong")]
    batcher.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        batcher.submit(np.zeros(2), 1)


SEARCHING = """
import time
from rwkv_clip.search.batching import Batcher

def search(vectors, count, allowed):
    time.sleep(0.3)
    print("searched")

Batcher(search, most=4).submit([0.0], 1)
"""


def test_python_does_not_end_within_a_search():
    ended = subprocess.run([sys.executable, "-c", SEARCHING], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "searched\n", "")


def test_thumbnails_are_bounded():
    made = []
    thumbnails = Thumbnails(lambda row, side: made.append(row) or bytes(800), most=3000)
    for row in (0, 1, 2, 0, 3, 0, 1):
        assert len(thumbnails.make(row, 64)) == 800
    assert made == [0, 1, 2, 3, 1]  # the one that was used last stays
    assert thumbnails._size <= 3000


# ---- the process -----------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from helpers.search_collection import make_collection
from rwkv_clip.search.server import serve
sys.exit(serve(make_collection(8, size=32), port=0, ready=lambda url: print(url, flush=True)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_server_in_good_order(number):
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(f"{url}api/search?q=red", timeout=20) as response:
            assert response.status == 200
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0 and said == ""


def test_a_port_that_is_taken(collection):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match=r"in use.*127.0.0.1"):
        server_module.serve(collection, port=taken.getsockname()[1])


def test_answers_do_not_wait_for_acknowledgements():
    with server_module.listen("localhost", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # where asyncio switches Nagle's algorithm off
        with socket.create_connection(listener.getsockname()[:2], 10), listener.accept()[0] as accepted:
            assert accepted.proto == socket.IPPROTO_TCP


def test_room_is_left_by_those_who_fail():
    room = service_module.Room(1)

    async def fail():
        with room:
            raise ValueError

    for _ in range(3):
        with pytest.raises(ValueError):
            asyncio.run(fail())
