"""Real servers, without a GPU or a hub: llama.cpp's and transformers', each with a tiny random model."""

import asyncio
import importlib.util
import json
import re
from collections import Counter

import pytest

pytest.importorskip("aiohttp")
from helpers.tiny_servers import llama_server, transformers_server, write_gguf, write_llama
from rwkv_clip.describe.client import Client, Limits
from rwkv_clip.describe.composers.openai import Asking, OpenAI
from rwkv_clip.describe.doctor import diagnose, format_findings
from rwkv_clip.describe.prompt import SHIPPED, Prompt
from rwkv_clip.describe.sources import Sources, Tag

LIMITS = Limits(concurrency=4, back_off=0.01, stop_after=0)


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed: pip install -e '.[dev]'")


def prompt_with(tmp_path, **text):
    """A short prompt whose schema allows such text."""
    content = json.loads((SHIPPED / "grounded.json").read_text())
    content["system"] = "Write JSON."
    content["schema"]["properties"]["text"] |= text
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps(content))
    return Prompt.load(path)


def compose(address, prompt, count, **asking):
    async def work():
        composer = OpenAI(Client(address, None, LIMITS), prompt, Asking(**asking))
        rows = [Sources(str(i), f"row {i} of Brighton", "a dog runs", (Tag("dog"), Tag("sand"))) for i in range(count)]
        found = {place: composed async for place, composed in composer.compose(rows)}
        await composer.close()
        return found, composer

    return asyncio.run(work())


def examine(address, prompt, **asking):
    async def work():
        client = Client(address, None, Limits(back_off=0.01))
        found = await diagnose(client, prompt, Asking(**asking))
        await client.close()
        return found

    findings = asyncio.run(work())
    print(format_findings(findings))
    return {finding.name: finding for finding in findings}


@pytest.fixture(scope="module")
def llama(new_folder):
    path = new_folder("llama") / "tiny.gguf"
    write_gguf(path)
    with llama_server(path) as address:
        yield address


@needs("xllamacpp", "gguf")
def test_llama_cpp_keeps_to_a_schema_of_ascii(llama, tmp_path):
    """A4: every answer is valid at the first try."""
    prompt = prompt_with(tmp_path, pattern="^[A-Za-z]{4,8} [a-z ]{4,16}$")
    found, composer = compose(llama, prompt, 200, model="tiny", temperature=1.0, max_tokens=100)
    assert len(found) == 200 and {composed.status for composed in found.values()} == {"ok"}
    assert all(
        re.fullmatch("[A-Za-z]{4,8} [a-z ]{4,16}", composed.text) or composed.text for composed in found.values()
    )
    assert {composed.attempts for composed in found.values()} == {1} and not composer.client.problems
    assert composer.prompt_tokens == sum(composed.prompt_tokens for composed in found.values()) > 200 * 100
    assert composer.completion_tokens == sum(composed.completion_tokens for composed in found.values())


@needs("xllamacpp", "gguf")
def test_llama_cpp_fails_on_free_text_and_every_row_has_a_status(llama, tmp_path):
    """A4: its errors 500 are counted, and those rows are asked for in plain text."""
    found, composer = compose(llama, prompt_with(tmp_path), 60, model="tiny", temperature=1.0, max_tokens=60)
    assert len(found) == 60 and all(c.text if c.status == "ok" else c.reason for c in found.values())
    assert composer.client.problems["http 500"] > 0
    assert max(composed.attempts for composed in found.values()) <= 4


@needs("xllamacpp", "gguf")
def test_doctor_on_llama_cpp(llama, tmp_path):
    prompt = prompt_with(tmp_path, pattern="^[A-Za-z]{4,8} [a-z ]{4,16}$")
    found = examine(llama, prompt, model="other", temperature=1.0)
    good = {name: finding.ok for name, finding in found.items()}
    assert good == {
        "server": True, "model": False, "schema": True, "long prompt": True, "longest row": True, "burst": True,
        "answers": True, "usage": True, "thinking": True,
    }  # fmt: skip
    assert "refused" in found["long prompt"].detail and "tiny.gguf" in found["model"].detail


@needs("transformers", "fastapi", "uvicorn")
def test_transformers_ignores_the_schema_and_rows_are_read_as_plain_text(tmp_path):
    """A5."""
    write_llama(tmp_path / "model")
    model = {"model": str(tmp_path / "model"), "max_tokens": 100, "temperature": 1.0}
    with transformers_server(tmp_path / "model") as address:
        found = examine(address, prompt_with(tmp_path), **model)
        texts, _ = compose(address, prompt_with(tmp_path), 20, **model)
    assert found["schema"].ok is False and found["schema"].detail.startswith("schema ignored")
    assert found["server"].ok and found["model"].ok and found["usage"].ok
    statuses = Counter(composed.status for composed in texts.values())
    assert statuses["ok"] >= 10 and set(statuses) <= {"ok", "rejected"}, statuses
    assert {composed.attempts for composed in texts.values() if composed.status == "ok"} <= {3, 4}
