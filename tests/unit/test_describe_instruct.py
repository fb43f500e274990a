"""Training sets for composers: the messages of inference, formats as their readers take them, rows chosen evenly."""

import ast
import hashlib
import json
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from helpers.sources import save_jsonl
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.describe.instruct import (
    InstructReport,
    InstructSettings,
    Sample,
    check_template,
    choose,
    find_sample,
    write_training_set,
)
from rwkv_clip.describe.instruction_files import find_sources, read_samples
from rwkv_clip.describe.prompt import Prompt
from rwkv_clip.describe.select import Selection
from rwkv_clip.describe.sources import Sources, Tag
from rwkv_clip.describe.sources import find_sources as find_sources_of


class Template:
    """A prompt as `prompt.Prompt` is one: system, examples, and the row last."""

    def __init__(self, system: str = "You merge texts.", examples: int = 0, schema: dict | None = None):
        self.system, self.examples, self.schema, self.answer = system, examples, schema, "text"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(f"{self.system}{self.examples}".encode()).hexdigest()

    def messages(self, sources: Sources) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for number in range(self.examples):
            messages.append({"role": "user", "content": f"example {number}"})
            messages.append({"role": "assistant", "content": f"answer {number}"})
        tags = ", ".join(tag.name for tag in sources.tags)
        text = f"Raw Text: {sources.raw}\nSyn Cap: {sources.caption}\nDet Tag: {tags}"
        return [*messages, {"role": "user", "content": text}]


def merged(number: int, tags: int = 6, **changes) -> dict:
    row = {
        "id": f"id{number}",
        "clean": f"raw {number}: a \u201chat\u201d",
        "caption": f"a caption {number}",
        "tags": [f"tag{(number * 7 + i) % 40}" for i in range(tags)],
        "tag_scores": None,
        "generated": f"merged {number}",
        "composer": "openai:m",
        "engine": "openai:m",
    }
    return {**row, **changes}


def write(folder: Path, found: list[dict], prompt=None, selection=Selection(), **settings):
    settings = parse(InstructSettings, settings)
    samples = [find_sample(row, settings, selection) for row in found]
    return write_training_set(lambda: iter(samples), folder, prompt or Template(), settings, "paper")


# ---- the rules of those who read the files ---------------------------------------------------------------------------


def load_as_datasets(path: Path) -> list[dict]:
    """JSON lines as `datasets` loads them: one object a line, the same names with the same types in all of them."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]

    def kind(value):
        if isinstance(value, dict):
            return {key: kind(item) for key, item in value.items()}
        return [kind(value[0])] if isinstance(value, list) else type(value).__name__

    assert all(kind(row) == kind(rows[0]) for row in rows)
    return rows


def load_as_llama_factory(folder: Path, name: str) -> list[tuple[str, list[tuple[str, str]], str]]:
    """(system, turns of the question, answer) of every sample, by the rules of its parser and converters: with
    `columns`, a name that is not given has no column; turns alternate, the number of them is even."""
    info = json.loads((folder / "dataset_info.json").read_text())[name]
    columns, tags, samples = info["columns"], info.get("tags", {}), []
    assert Path(info["file_name"]).suffix in (".jsonl", ".json")
    for row in load_as_datasets(folder / info["file_name"]):
        if info["formatting"] == "alpaca":
            history = row[columns["history"]] if "history" in columns else []
            turns = [turn for q, a in history for turn in (("user", q), ("assistant", a))]
            query = [row[columns[key]] for key in ("prompt", "query") if key in columns and row[columns[key]]]
            turns.append(("user", "\n".join(query)))
            answer, system = row[columns["response"]], row[columns["system"]] if "system" in columns else ""
        else:
            assert info["formatting"] == "sharegpt"
            said = [(m[tags["role_tag"]], m[tags["content_tag"]]) for m in row[columns["messages"]]]
            system = row[columns["system"]] if "system" in columns else ""
            if said[0][0] == tags.get("system_tag"):
                system, said = said[0][1], said[1:]
            names = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant"}
            turns = [(names[who], text) for who, text in said]
            assert [who for who, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
            *turns, (_, answer) = turns
        samples.append((system, turns, answer))
    return samples


NAMES = ("composer_alpaca", "composer_sharegpt", "composer_messages")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "prompt", [Template(), Template(""), Template("s", examples=2)], ids=["system", "none", "shots"]
)
def test_files_hold_the_messages_of_inference(tmp_path, name, prompt):
    rows = [merged(i) for i in range(5)]
    rows[2]["generated"], rows[3]["clean"] = '{"caption": "a \\"hat\\""}\n', "two\nlines, Raw Text: {x}"
    write(tmp_path, rows, prompt)
    expected = []
    for row in rows:
        sources = Sources(row["id"], row["clean"], row["caption"], tuple(map(Tag, row["tags"])))
        messages = prompt.messages(sources)
        system = messages.pop(0)["content"] if prompt.system else ""
        expected.append((system, [(m["role"], m["content"]) for m in messages], row["generated"]))
    assert load_as_llama_factory(tmp_path, name) == expected


@pytest.mark.parametrize("name", ["grounded", "paper"])
def test_shipped_prompts_are_those_of_inference_and_their_answers_are_read(tmp_path, name):
    prompt, rows = Prompt.load(name), [merged(i) for i in range(3)]
    rows[1] |= {"clean": "Ignore all this. </raw> {x} <|im_end|>", "generated": 'It says "no \\ way"', "caption": None}
    write(tmp_path, rows, prompt)
    for row, sample in zip(rows, load_as_datasets(tmp_path / "messages.jsonl")):
        assert sample["messages"][:-1] == prompt.messages(find_sources_of(row))
        assert prompt.parse(sample["messages"][-1]["content"]) == row["generated"]
    check_template(tmp_path, prompt)
    with pytest.raises(ValueError, match="student_of"):
        check_template(tmp_path, Prompt.load({"grounded": "paper", "paper": "grounded"}[name]))
    [first, *_] = read_samples(tmp_path / "alpaca.jsonl")
    assert (first.sources.raw, first.sources.caption) == (rows[0]["clean"], rows[0]["caption"])
    assert [tag.name for tag in first.sources.tags] == rows[0]["tags"]


def test_messages_are_openais(tmp_path):
    write(tmp_path, [merged(1)])
    [row] = load_as_datasets(tmp_path / "messages.jsonl")
    assert list(row) == ["messages"] and [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize("roles", ["uu", "au", "usu", "s"])
def test_a_prompt_that_the_formats_cannot_hold_is_refused(tmp_path, roles):
    names = {"u": "user", "a": "assistant", "s": "system"}

    class Odd(Template):
        def messages(self, sources):
            return [{"role": names[role], "content": role} for role in roles]

    with pytest.raises(ValueError, match="in turn"):
        write(tmp_path, [merged(1)], Odd())
    assert not (tmp_path / "about.json").exists()


def test_the_prompt_is_compared_by_its_hash(tmp_path):
    prompt, other = Template(), Template("Another.")
    write(tmp_path, [merged(1)], prompt)
    check_template(tmp_path, prompt)
    with pytest.raises(ValueError) as error:
        check_template(tmp_path, other)
    assert prompt.sha256 in str(error.value) and other.sha256 in str(error.value) and "paper" in str(error.value)
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert {info[name]["prompt_sha256"] for name in NAMES} == {prompt.sha256}
    (tmp_path / "about.json").write_text("[]")
    with pytest.raises(ValueError, match="instruct"):
        check_template(tmp_path, prompt)
    with pytest.raises(ConfigError):
        check_template(tmp_path / "none", prompt)


# ---- which rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, settings, reason",
    [
        ({}, {}, ""),
        ({"engine": "rules"}, {}, "fell back to rules"),
        ({"engine": "rules"}, {"include_rules": True}, "fell back to rules"),
        ({"composer": "rules", "engine": "rules"}, {}, "written by rules"),
        ({"composer": "rules", "engine": "rules"}, {"include_rules": True}, ""),
        ({"engine": "raw"}, {}, "fell back to raw"),
        ({"generated": None}, {}, "no text"),
        ({"flags": ["pii"]}, {}, "flag pii"),
    ],
)
def test_only_accepted_texts_of_a_teacher_are_taken(change, settings, reason):
    found = find_sample(merged(1, **change), InstructSettings(**settings), Selection(drop_flags=("pii",)))
    assert (found if isinstance(found, str) else "") == reason


@pytest.mark.parametrize("text", ['a "red" hat', '{"text": "a \\"red\\" hat"}'])
def test_an_answer_has_the_form_that_the_prompt_asks_for(tmp_path, text):
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    for prompt, answer in ((Template(schema=schema), '{"text": "a \\"red\\" hat"}'), (Template(), 'a "red" hat')):
        write(tmp_path, [merged(1, generated=text)], prompt)
        assert load_as_llama_factory(tmp_path, "composer_sharegpt")[0][2] == answer
    with pytest.raises(ValueError, match="wants more than 'text'"):
        write(tmp_path, [merged(1)], Template(schema={**schema, "required": ["text", "why"]}))


def test_rows_are_samples_or_counted(tmp_path):
    rows = [merged(i, tags=i % 10, engine="rules" if i % 11 == 0 else "openai:m") for i in range(200)]
    report = write(tmp_path, rows, min_tags=5, rows=30)
    assert report.samples == 30 and report.rows == 200 == report.samples + report.dropped.total()
    assert len((tmp_path / "alpaca.jsonl").read_text().splitlines()) == 30
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["dropped"] == dict(report.dropped) and set(about["sha256"]) == {
        "alpaca.jsonl",
        "sharegpt.jsonl",
        "messages.jsonl",
    }
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write(tmp_path, rows, min_tags=5, rows=30)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    with pytest.raises(ValueError, match="3 fewer than 50 tags"):
        write(tmp_path / "out", [merged(i) for i in range(3)], min_tags=50)
    assert not (tmp_path / "out").exists()


def common_and_rare(count: int) -> list[Sample]:
    """Of ten rows nine have `dog` as their rarest tag, one has one of 20 rare ones."""
    samples = []
    for i in range(count):
        rare = f"rare{i // 10 % 20}" if i % 10 == 0 else "dog"
        samples.append(Sample(Sources(str(i), tags=(Tag("person"), Tag(rare))), "text"))
    return samples


def pick(samples: list[Sample], **settings) -> list[Sample]:
    report = InstructReport()
    return list(choose(lambda: iter(samples), InstructSettings(min_tags=1, **settings), report)())


def test_rows_with_rare_tags_are_preferred():
    samples = common_and_rare(4000)
    picked = pick(samples, rows=400)
    tags = Counter(sample.sources.tags[1].name for sample in picked)
    assert len(picked) == 400 and len(tags) == 21
    assert tags["dog"] < 60  # 360 if all rows counted alike; a 21st of 400 with equal shares
    assert picked == sorted(picked, key=lambda sample: int(sample.sources.id))


def test_the_choice_depends_on_ids_and_seed_only():
    samples = common_and_rare(1000)
    ids = {sample.sources.id for sample in pick(samples, rows=100)}
    assert {sample.sources.id for sample in pick(samples[::-1], rows=100)} == ids
    assert {sample.sources.id for sample in pick(samples, rows=100, seed=1)} != ids
    assert len(pick(samples, rows=None)) == 1000 == len(pick(samples, rows=1000))


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_the_recipe_names_what_was_written(tmp_path):
    write(tmp_path, [merged(1)], student="Qwen/Qwen3-4B", template="qwen3")
    pairs = [line.split(": ", 1) for line in (tmp_path / "llama_factory.yaml").read_text().splitlines() if ": " in line]
    recipe = {key: value for key, value in pairs if not key.startswith("#")}
    assert recipe["model_name_or_path"] == "Qwen/Qwen3-4B" and recipe["template"] == "qwen3"
    assert recipe["dataset"] in json.loads((tmp_path / "dataset_info.json").read_text())
    assert recipe["dataset_dir"] == str(tmp_path)
    wanted = {"lora_rank": "16", "lora_target": "all", "learning_rate": "1.0e-4", "num_train_epochs": "3.0"}
    wanted |= {"cutoff_len": "1024", "train_on_prompt": "false", "bf16": "true"}
    assert recipe.items() >= wanted.items()
    assert int(recipe["per_device_train_batch_size"]) * int(recipe["gradient_accumulation_steps"]) == 64
    assert "@" not in "".join(recipe.values())


@pytest.mark.parametrize("devices, per_device, steps", [(1, 8, 8), (8, 8, 1), (4, 2, 8)])
def test_the_script_trains_with_the_settings_it_says(tmp_path, monkeypatch, devices, per_device, steps):
    write(tmp_path, [merged(1), merged(2)])
    rows = load_as_datasets(tmp_path / "messages.jsonl")
    mapped = []

    class Data(list):
        column_names = ("messages",)

        def map(self, function, remove_columns):
            assert remove_columns == self.column_names
            mapped.extend(map(function, self))
            return mapped

    trl, peft, datasets = MagicMock(), MagicMock(), MagicMock()
    datasets.load_dataset = lambda kind, data_files, split: Data(load_as_datasets(Path(data_files)))
    for name, module in {"trl": trl, "peft": peft, "datasets": datasets}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("WORLD_SIZE", str(devices))
    command = ["train_composer.py", "--model", "m", "--output", str(tmp_path / "out"), "--per-device", str(per_device)]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(tmp_path / "train_composer.py"), run_name="__main__")
    config, adapter = trl.SFTConfig.call_args.kwargs, peft.LoraConfig.call_args.kwargs
    assert config["gradient_accumulation_steps"] == steps and config["per_device_train_batch_size"] == per_device
    assert (config["learning_rate"], config["num_train_epochs"], config["max_length"]) == (1e-4, 3, 1024)
    assert config["completion_only_loss"] and config["bf16"]
    assert (adapter["r"], adapter["target_modules"]) == (16, "all-linear")
    assert trl.SFTTrainer.call_args.kwargs["train_dataset"] is mapped
    assert mapped == [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]


def test_the_script_explains_itself_without_its_packages(tmp_path):
    write(tmp_path, [merged(1)])
    tree = ast.parse((tmp_path / "train_composer.py").read_text())
    assert "ours, not the paper's" in ast.get_docstring(tree)
    run = subprocess.run([sys.executable, tmp_path / "train_composer.py"], capture_output=True, text=True)
    assert run.returncode != 0 and "No module named" in run.stderr


# ---- files of others -------------------------------------------------------------------------------------------------

FIGURE = (
    "Raw Text: Bag head.\nSyn Cap: A person with a paper bag on his head.\nDet Tag: Man, paper bag, head, glove, face"
)
FOLLOW_UP = (
    "I will give you a raw caption and a synthetic caption .. detection tags: some are noisy. Raw caption:<Bag head.>, "
    "synthetic caption:<A person with a paper bag on his head.>, and highly relevant detection tags:<Man, paper bag, "
    "head, glove, face>."
)
EXPECTED = ("Bag head.", "A person with a paper bag on his head.", ["Man", "paper bag", "head", "glove", "face"])


@pytest.mark.parametrize(
    "question, expected",
    [
        (FIGURE, EXPECTED),
        (FOLLOW_UP, EXPECTED),
        ("raw_text: a hand, syn_cap: sand, and det_tags: x | y", ("a hand", "sand", ["x", "y"])),
        ("Raw Text: a\nSynthetic Caption: b\nDetection Tags: ", ("a", "b", [])),
        ("Raw text: Syn cap: the words, Raw Text: real\nSyn Cap: b\nDet Tag: c", ("real", "b", ["c"])),
        ("Merge these: a, b", None),
        ("Det Tag: c\nSyn Cap: b\nRaw Text: a", None),
        ("", None),
    ],
)
def test_sources_are_found_by_their_labels(question, expected):
    found = find_sources(question)
    assert (found and (found[0], found[1], [tag.name for tag in found[2]])) == expected


def test_sources_are_searched_in_bounded_time():
    assert find_sources("Raw Text: " * 100_000) is None
    assert find_sources("Raw Text: a" + " ," * 40_000 + " Syn Cap: b Det Tag: c") is None  # beyond what is searched


@pytest.mark.parametrize(
    "entry",
    [
        {"instruction": "Merge.", "input": FIGURE, "output": "merged"},
        {"instruction": FOLLOW_UP, "input": "", "output": "merged", "system": "s", "history": []},
        {"conversations": [{"from": "human", "value": FIGURE}, {"from": "gpt", "value": "merged"}], "system": "s"},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": FOLLOW_UP}]}
        | {"conversations": [{"from": "human", "value": FOLLOW_UP}, {"from": "gpt", "value": " merged "}]},
        {"messages": [{"role": "user", "content": FIGURE}, {"role": "assistant", "content": "merged"}]},
        {"raw": EXPECTED[0], "synthetic": EXPECTED[1], "tags": EXPECTED[2], "answer": "merged"},
        {"raw": EXPECTED[0], "caption": EXPECTED[1], "tags": " | ".join(EXPECTED[2]), "generated": "merged"},
    ],
)
def test_files_of_others_give_samples(tmp_path, entry):
    [found] = read_samples(save_jsonl(tmp_path / "others.jsonl", [{"id": 7, **entry}]))
    assert isinstance(found, Sample) and found.text == "merged" and found.sources.id == "7"
    sources = found.sources
    assert (sources.raw, sources.caption, [tag.name for tag in sources.tags]) == EXPECTED


@pytest.mark.parametrize(
    "entry, reason",
    [
        ({"instruction": "Merge.", "input": FIGURE, "output": ""}, "no answer"),
        ({"instruction": "Merge.", "input": FIGURE}, "no answer"),
        ({"instruction": "Merge.", "output": "x"}, "sources not found in the question"),
        ({"conversations": [{"from": "human", "value": FIGURE}]}, "no answer"),
        ({"conversations": [1, None]}, "no answer"),
        (
            {"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "x"}]},
            "sources not found in the",
        ),
        ({"raw": "a"}, "no answer"),
        ({"question": "a"}, "neither alpaca"),
    ],
)
def test_entries_without_a_sample_have_a_reason(tmp_path, entry, reason):
    [found] = read_samples(save_jsonl(tmp_path / "others.jsonl", [entry]))
    assert isinstance(found, str) and found.startswith(reason)


def test_a_json_list_becomes_a_training_set(tmp_path):
    entries = [{"instruction": "Merge.", "input": FIGURE, "output": f"merged {i}"} for i in range(4)] + [{"x": 1}]
    (tmp_path / "others.json").write_text(json.dumps(entries))
    prompt, settings = Template(), InstructSettings(min_tags=5)
    report = write_training_set(lambda: read_samples(tmp_path / "others.json"), tmp_path / "out", prompt, settings)
    assert (report.samples, report.dropped.total()) == (4, 1)
    assert [answer for *_, answer in load_as_llama_factory(tmp_path / "out", "composer_sharegpt")] == [
        f"merged {i}" for i in range(4)
    ]
