"""Captions by a vision server: what is sent, and what becomes of pictures that cannot be."""

import asyncio
import base64
import io

import pytest
from PIL import Image

pytest.importorskip("aiohttp")
from helpers.fault_server import FaultServer
from rwkv_clip.describe.client import Client, Limits, ServerRefused
from rwkv_clip.describe.composers.openai import Asking
from rwkv_clip.describe.vision_captioner import VisionCaptioner

QUICK = Limits(back_off=0.01, stop_after=0)


def encode(size=(900, 300), color=(200, 30, 30), kind="JPEG", **more):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind, **more)
    return buffer.getvalue()


def caption(pictures, faults=None, limits=QUICK, answer=lambda body: "A red wall.", **more):
    async def work():
        captioner = VisionCaptioner(Client(server.url, None, limits), Asking("tiny", max_tokens=60), **more)
        try:
            return {place: composed async for place, composed in captioner.caption(pictures)}
        finally:
            await captioner.close()

    with FaultServer(faults, answer=answer) as server:
        return asyncio.run(work()), server


def sent(body):
    text, image = body["messages"][0]["content"]
    head, _, data = image["image_url"]["url"].partition(",")
    assert (text["type"], image["type"], head) == ("text", "image_url", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_pictures_are_sent_upright_as_small_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    pictures = [encode(), encode((40, 20)), encode(kind="PNG"), encode((300, 900), exif=exif)]
    found, server = caption(
        [(str(i), data) for i, data in enumerate(pictures)], longest=300, limits=Limits(concurrency=1)
    )
    assert [found[place].text for place in range(4)] == ["A red wall."] * 4
    images = [sent(body) for body in server.bodies]
    assert [(image.size, image.format) for image in images] == [
        ((300, 100), "JPEG"), ((40, 20), "JPEG"), ((300, 100), "JPEG"), ((300, 100), "JPEG")
    ]  # fmt: skip
    assert images[0].getpixel((150, 50))[0] > 180
    assert found[0].prompt_tokens and "response_format" not in server.bodies[0]


def test_pictures_that_cannot_be_decoded_are_failed_rows_and_not_sent():
    pictures = [("1", b"no picture"), ("2", encode()[:200]), ("3", b""), ("4", encode())]
    found, server = caption(pictures)
    assert [found[place].status for place in range(4)] == ["failed"] * 3 + ["ok"]
    assert all(found[place].reason and found[place].attempts == 0 for place in range(3)) and len(server.log) == 1


@pytest.mark.parametrize(
    "faults, status, reason",
    [
        (lambda row, before: "empty" if before < 2 else None, "ok", ""),
        (lambda row, before: "502_html" if before < 2 else None, "ok", ""),
        ({"length": 1.0}, "rejected", "cut at max_tokens"),
        ({"502_html": 1.0}, "failed", "http 502"),
        ({"400": 1.0}, "failed", "prompt too long"),
    ],
)
def test_answers_of_no_use(faults, status, reason):
    found, server = caption([("1", encode())], faults)
    assert (found[0].status, found[0].reason) == (status, reason)
    assert found[0].attempts == len(server.bodies) == sum(server.requests.values())


def test_asking_again_changes_what_is_drawn():
    _, server = caption([("1", encode())], {"empty": 1.0})
    assert len({body["seed"] for body in server.bodies}) == 4
    assert [body["temperature"] for body in server.bodies] == [0.0, 0.7, 0.7, 0.7]


def test_quotes_and_chatter_go():
    found, _ = caption([("1", encode())], answer=lambda body: 'Sure! Here is the caption:\n\n"A red wall."')
    assert found[0].text == "A red wall."


def test_a_server_that_is_gone_ends_the_run():
    limits = Limits(concurrency=2, back_off=0.001, stop_after=3)
    with pytest.raises(ServerRefused, match="3 rows in a row got no text"):
        caption([(str(i), encode()) for i in range(50)], {"502_html": 1.0}, limits)


def test_what_decides_a_caption():
    client = Client("http://host")
    base = VisionCaptioner(client, Asking("m")).decides
    assert VisionCaptioner(client, Asking("m"), longest=256).decides != base
    assert VisionCaptioner(client, Asking("m"), "Say it.").decides != base
    with pytest.raises(ValueError, match="longest"):
        VisionCaptioner(client, Asking("m"), longest=3)
