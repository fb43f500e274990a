"""Settings of the commands: each has the tables that it needs, and the command line is built from these types."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import arg

from rwkv_clip.config import ranged

from .job import parse_shard

KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Where the job is, and how its parts are worked on. None of these decides what a text is."""

    output: str
    """Folder of the job: one for each input and composer. The same command goes on where an earlier one stopped."""
    workers: int = ranged(2, minimum=1)
    """Processes for work that waits for nobody (cleaning, the rules composer, checks)."""
    shard: str | None = None
    """i/n: only every n-th part, from i on: n such commands, on any machines that share the folder, do all parts. A run
    without it then finishes the job."""
    executor: Literal["local", "ray"] = "local"
    """ray: parts are given out by Ray Data on a cluster that shares the folder (extra `ray`)."""
    ray_address: str | None = None
    """Ray's cluster, `auto` for the one this machine belongs to; default: Ray on this machine only."""
    retry_failed: bool = True
    """Try rows that failed before again."""
    new_run: bool = False
    """Put rows that were made with other settings aside, and make them anew."""

    def problems(self) -> list[str]:
        """Problems of these settings."""
        try:
            parse_shard(self.shard)
        except ValueError as error:
            return [str(error)]
        both = self.executor == "ray" and self.shard
        return ["shard: not with --executor ray, which gives out the parts itself; leave it out"] if both else []


@dataclass(frozen=True, kw_only=True)
class InputSettings:
    """What is described. The fields are found by their usual names where they are not given."""

    input: str | None = None
    """JSONL, CSV/TSV, JSON, Parquet, webdataset tars, a folder of pictures with texts, or an .npy of token ids."""
    images: str | None = None
    """Folder that names of pictures start from; default: that of the input. For an .npy: the file that lists them."""
    texts: Annotated[tuple[str, ...], arg(metavar="TEXT ...")] = ()
    """Fields of the raw text and the caption, as for data2rec.py: `raw=FIELD synthetic=FIELD`."""
    tags_field: str | None = None
    """Field of the tags: a list, or a text in which | , or ; separate them."""
    ocr_field: str | None = None
    """Field of the text that was read in the picture."""
    id_field: str | None = None
    """Field of the row's id; default: id, key, uid or image_id, else the row's place in its file."""
    where: Annotated[tuple[str, ...], arg(metavar="CONDITION ...")] = ()
    """Take only rows for which all hold: FIELD=VALUE, FIELD!=VALUE, FIELD>=NUMBER."""
    image_field: str | None = None
    """Field of the picture or its path, where it has none of the usual names."""
    allow_outside: bool = False
    """Names of pictures may lead out of their folder (`..`, absolute, links)."""
    limit: int | None = ranged(None, minimum=1)
    """Take the first rows only, for a trial."""
    part_rows: int | None = ranged(None, minimum=1)
    """Rows per part file, fixed when a job begins; default 5000."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """An OpenAI-compatible server, and how it is asked."""

    base_url: str | None = None
    """For example http://localhost:8000/v1. Without it nothing is asked of any network."""
    model: str | None = None
    """The model's name, as the server knows it."""
    revision: str = ""
    """Revision of the model; only noted, and decides with the name whether rows are the same."""
    key_variable: str = KEY_VARIABLE
    """Environment variable that holds the key, where the server wants one. The key is written nowhere."""
    concurrency: int = ranged(64, minimum=1, maximum=4096)
    """Most requests in flight; fewer while the server is busy."""
    deadline: float = ranged(120.0, above=0)
    """Seconds that an answer may take."""
    stop_after: int = ranged(50, minimum=1)
    """Rows that fail one after the other before the run stops."""
    extra_body: str = ""
    """JSON object that is sent along, for example '{"chat_template_kwargs": {"enable_thinking": false}}'. It is
    written into the job's folder: no place for a key."""


@dataclass(frozen=True, kw_only=True)
class CaptionerSettings:
    """A captioner in this process (--captioner transformers)."""

    caption_model: str | None = None
    """Folder that `save_pretrained` wrote, or a name on the hub, for example Salesforce/blip-image-captioning-base."""
    captioner_revision: str | None = None
    """Revision of a model on the hub."""
    captioner_prompt: str = ""
    """What the model is asked with the picture: nothing for BLIP, <CAPTION> for Florence-2."""
    download: bool = False
    """Allow a model that is not on this machine to be fetched from the hub."""
    caption_tokens: int = ranged(40, minimum=1, maximum=1024)
    """Most tokens of a caption; one that is cut there counts as none."""
    caption_batch: int = ranged(16, minimum=1)
    """Pictures that the captioner takes at a time."""
    device: str | None = None
    """Of models in this process: cpu, cuda, cuda:1, mps; default: the best present."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of models in this process: type of the weights and of the arithmetic."""

    def problems(self) -> list[str]:
        """None: the model decides."""
        return []


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """The model that compares pictures and texts: it gives CLIP scores, and tags with --tagger checkpoint."""

    checkpoint: str | None = None
    """Run folder, checkpoint folder, .safetensors, released .pt, or open_clip:NAME[:TAG]."""
    checkpoint_model: str | None = None
    """Model name or JSON, where the checkpoint does not describe its model."""
    device: str | None = None
    """Of models in this process: cpu, cuda, cuda:1, mps; default: the best present."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of models in this process: type of the weights and of the arithmetic."""
    decoders: int = ranged(4, minimum=0)
    """Threads that decode pictures; no figure depends on it."""

    def problems(self) -> list[str]:
        """None: the checkpoint decides."""
        return []


@dataclass(frozen=True, kw_only=True)
class TaggerSettings(CheckpointSettings):
    """Which names a picture gets (--tagger checkpoint)."""

    tag_list: str | None = None
    """Text file of names, one a line; default: the list that is shipped."""
    background: int = ranged(2000, minimum=32)
    """How many of the first pictures of the job names are calibrated on."""
    min_z: float = ranged(2.5, above=0)
    """Standard deviations by which a name has to fit better than it does on average. What is on more than
    1 / (1 + min_z²) of the pictures (14 % at 2.5) never gets its tag: common things have to come from captions."""
    most_tags: int = ranged(12, minimum=1)
    """Most tags of a picture, best first."""
    max_share: float = ranged(0.2, above=0, maximum=1)
    """Names that reach `min_z` on a larger fraction of the background are left out; happens only below a `min_z` of 2,
    by the bound above (Cantelli's inequality)."""


@dataclass(frozen=True, kw_only=True)
class CaptionSettings(ServerSettings, CaptionerSettings):
    """Who captions pictures. Rows that have a caption keep it."""

    captions: str | None = None
    """File of captions that exist already: JSONL, CSV/TSV or Parquet with id and caption, or an .npy of token ids."""
    captioner: Literal["none", "openai", "transformers"] = "none"
    """openai: a server whose model sees pictures. transformers: a model in this process (extra `captioners`)."""
    caption_url: str | None = None
    """The captioner's server; default: --base-url."""
    caption_model: str | None = None
    """The captioner's model: as the server knows it (default: --model), or for transformers a folder that
    `save_pretrained` wrote or a name on the hub, for example Salesforce/blip-image-captioning-base."""
    caption_side: int = ranged(512, minimum=64, maximum=4096)
    """Longest side in pixels of the pictures that are sent."""

    def problems(self) -> list[str]:
        """Problems of these settings."""
        if self.captioner == "openai" and not (self.caption_url or self.base_url):
            return ["caption_url: not set; a vision server needs one, for example http://localhost:8000/v1"]
        if self.captioner == "openai" and not (self.caption_model or self.model):
            return ["caption_model: not set; a vision server needs the name of a model"]
        return []


@dataclass(frozen=True, kw_only=True)
class TagSettings:
    """Who tags pictures. Rows that have tags keep them."""

    tags: str | None = None
    """File of tags that exist already: JSONL, CSV/TSV or Parquet with id and tags."""
    tagger: Literal["none", "checkpoint", "text"] = "none"
    """checkpoint: zero-shot, with --checkpoint and --tag-list. text: nouns of the texts, which say nothing about the
    picture; for the report and for choosing rows only."""


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """What a text may be."""

    context: int = ranged(77, minimum=8)
    """Tokens of CLIP that a text may have, start and end included."""
    seed: int = ranged(0, minimum=0)
    """Seed of the job: every row's seed follows from it and the row's id."""
    prompt: str = "grounded"
    """grounded (strict JSON), paper (the published clauses), or a JSON file."""


@dataclass(frozen=True, kw_only=True)
class PriceSettings:
    """What tokens cost, for the report."""

    price_in: float | None = ranged(None, minimum=0)
    """Price of a million prompt tokens."""
    price_out: float | None = ranged(None, minimum=0)
    """Price of a million completion tokens."""
    currency: str = "USD"
    """Currency of the prices."""


@dataclass(frozen=True, kw_only=True)
class ComposeSettings(ServerSettings, TextSettings, PriceSettings):
    """Who writes the third text, and how."""

    composer: Literal["rules", "openai", "vllm", "replay"] = "rules"
    """rules: no model. openai: any compatible server. vllm: in this process. replay: recorded answers."""
    schema: bool = True
    """Ask the server to keep to the prompt's JSON schema."""
    ascii: bool = False
    """Let the schema allow plain ASCII only: for servers that fail on free text (llama.cpp)."""
    temperature: float = ranged(0.0, minimum=0, maximum=2)
    """Sampling temperature; 0 takes the likeliest token."""
    max_tokens: int = ranged(160, minimum=1)
    """Most tokens of an answer; one that is cut there counts as none."""
    attempts: int = ranged(4, minimum=1)
    """Requests for a row until an answer is usable."""
    variant: Literal["full", "short"] = "full"
    """For --composer rules: short takes the caption and two tags only."""
    answers: str | None = None
    """For --composer replay: JSONL of recorded answers, or the folder of an earlier job."""
    student_of: str | None = None
    """Folder of `instruct` that the model was trained on: refuse another prompt than that of the training."""
    max_cost: float | None = ranged(None, above=0)
    """Stop when the tokens of this command have cost this much; everything is kept."""

    def problems(self) -> list[str]:
        """Problems of these settings."""
        found = []
        if self.composer == "openai" and not self.base_url:
            found.append("base_url: not set; the openai composer needs one, for example http://localhost:8000/v1")
        if self.composer in ("openai", "vllm") and not self.model:
            found.append(f"model: not set; the {self.composer} composer needs the name of a model")
        if self.composer == "replay" and not self.answers:
            found.append("answers: not set; the replay composer needs a JSONL of answers or the folder of a job")
        if self.max_cost is not None and None in (self.price_in, self.price_out):
            found.append("max_cost: needs --price-in and --price-out, prices of a million tokens")
        return found


@dataclass(frozen=True, kw_only=True)
class VerifySettings(TextSettings):
    """When a composed text is not taken."""

    language: Literal["en", "any"] = "en"
    """Texts of another language are not taken."""
    max_unsupported: float = ranged(0.0, minimum=0, maximum=1)
    """Largest share of the text's nouns that neither raw text, caption nor tags support."""


@dataclass(frozen=True, kw_only=True)
class DedupSettings:
    """When a text repeats an earlier one."""

    near: float = ranged(0.8, above=0, maximum=1)
    """Share of words in common, in the same order, from which on two texts are nearly equal."""


def parse_extra(text: str) -> dict[str, Any]:
    """The object of --extra-body. ValueError."""
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise ValueError(f"extra_body: not JSON ({error}); give an object such as '{{\"top_k\": 1}}'") from None
    if not isinstance(found, dict):
        raise ValueError(f"extra_body: {text[:80]!r} is no JSON object; give one such as '{{\"top_k\": 1}}'")
    return found
