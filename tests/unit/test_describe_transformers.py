"""Captions by models of transformers: a tiny random BLIP, from a folder, without a network."""

import pytest
import torch
from PIL import Image

from helpers.pictures import encode, paint
from rwkv_clip.config import parse
from rwkv_clip.describe.pictures import Found
from rwkv_clip.describe.transformers_captioner import CaptionerSettings, TransformersCaptioner

transformers = pytest.importorskip("transformers")
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[DEC]",
    "a",
    "dog",
    "cat",
    "red",
    "on",
    "the",
    "grass",
    "man",
    "hat",
]


@pytest.fixture(scope="module")
def blip(new_folder):
    """A folder as `save_pretrained` writes it."""
    folder = new_folder("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(WORDS), "encoder_hidden_size": 32, "max_position_embeddings": 64}
    text |= {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    vision = {**size, "image_size": 32, "patch_size": 16, "initializer_range": 0.2}
    torch.manual_seed(1)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=32)
    model = transformers.BlipForConditionalGeneration(config)
    with torch.no_grad():  # random weights would say one word for every picture
        for name, parameter in model.text_decoder.named_parameters():
            if "crossattention" in name:
                parameter *= 30
        model.text_decoder.cls.predictions.bias[:6] -= 5
    model.save_pretrained(folder)
    words = transformers.BertTokenizer(str(folder / "vocab.txt"), additional_special_tokens=["[DEC]"])
    pictures = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(pictures, words).save_pretrained(folder)
    return folder


def load(folder, **changes) -> TransformersCaptioner:
    return TransformersCaptioner.load(
        parse(CaptionerSettings, {"caption_model": str(folder), "device": "cpu", **changes})
    )


def end_sentences(captioner: TransformersCaptioner) -> None:
    """Random words have no end: after as many as may be said, say it."""
    generate = captioner._model.generate

    def end(**options):
        ids = generate(**options)
        return torch.cat([ids, torch.full_like(ids[:, :1], 3)], 1)

    captioner._model.generate = end


PICTURES = [Found(n, encode(paint(40, 30, n), "PNG")) for n in range(9)]


def test_captions_of_pictures(blip, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    captioner = load(blip, caption_tokens=6)
    end_sentences(captioner)
    results = captioner.caption([PICTURES[0], Found(1, b"no"), Found(2, reason="missing image"), *PICTURES[3:]])
    assert [result["caption_status"] for result in results] == ["ok", "failed", "failed", *["ok"] * 6]
    assert [result["caption_reason"] for result in results[1:3]] == ["unreadable image", "missing image"]
    assert all(set(result["caption"].split()) <= set(WORDS) for result in results if result["caption"])
    assert results[0]["caption_source"] == f"transformers:{blip.name}" and results[1]["caption"] is None


def test_captions_do_not_depend_on_the_batch(blip):
    results = []
    for batch in (1, 3, 16):
        captioner = load(blip, caption_tokens=6, caption_batch=batch)
        end_sentences(captioner)
        results.append(captioner.caption(PICTURES))
    assert results[0] == results[1] == results[2]
    assert len({result["caption"] for result in results[0]}) > 1, "one caption for all shows nothing"
    assert captioner.caption([]) == []


def test_a_prompt_begins_the_caption(blip):
    captioner = load(blip, caption_tokens=6, captioner_prompt="a dog")
    end_sentences(captioner)
    captions = [result["caption"] for result in captioner.caption(PICTURES)]
    assert all(caption.startswith("a dog ") for caption in captions), captions


def test_a_caption_that_is_cut_counts_as_none(blip):
    results = load(blip, caption_tokens=4).caption(PICTURES[:2])
    assert {result["caption_reason"] for result in results} == {"cut at 4 tokens"}


def test_what_decides_is_named(blip, tmp_path):
    one, other = load(blip).decides, load(blip, caption_tokens=9).decides
    assert [key for key in one if one[key] != other[key]] == ["caption_tokens"]
    assert len(one["captioner_weights"]) == 64


@pytest.mark.parametrize("name", ["no-such/model", "/no/such/folder"])
def test_nothing_is_fetched_unless_allowed(name, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    with pytest.raises(ValueError, match=r"caption_model: .*--download"):
        load(name)


def test_pickled_weights_and_code_are_refused(blip, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in blip.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(folder)
    config = (blip / "config.json").read_text().replace('"model_type": "blip",', "", 1)
    coded = tmp_path / "coded"
    coded.mkdir()
    for file in blip.iterdir():
        (coded / file.name).write_bytes(file.read_bytes())
    config = '{"auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}, ' + config[1:]
    (coded / "config.json").write_text(config.replace('"model_type": "blip"', '"model_type": "evil"'))
    (coded / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(coded)
    assert not (tmp_path / "ran").exists()


def test_a_model_is_asked_for():
    with pytest.raises(ValueError, match="caption_model: not set"):
        TransformersCaptioner.load(CaptionerSettings())


def test_pictures_are_upright_before_the_model_sees_them(blip):
    captioner, seen = load(blip, caption_tokens=2), []
    own = captioner._processor
    captioner._processor = type(
        "Seen",
        (),
        {
            "__call__": lambda self, images, **more: seen.extend(images) or own(images=images, **more),
            "batch_decode": lambda self, *given, **more: own.batch_decode(*given, **more),
        },
    )()
    exif = Image.Exif()
    exif[0x0112] = 6
    captioner.caption([Found(0, encode(paint(40, 20), "JPEG", exif=exif))])
    assert seen[0].size == (20, 40) and seen[0].mode == "RGB"


def save_florence(folder) -> None:
    """A tiny random Florence-2 that knows bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {
        word: i
        for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    words = Tokenizer(models.BPE(vocab, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, **special, extra_special_tokens={"image_token": "<image>"}
    )
    stages = {name: [value] * 4 for name, value in {"embed_dim": 8, "num_heads": 2, "num_groups": 2}.items()}
    vision = {**stages, "depths": [1] * 4, "window_size": 4, "projection_dim": 16}
    text = {"model_type": "bart", "vocab_size": len(tokenizer), "d_model": 16, "max_position_embeddings": 256}
    text |= {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    text |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    image = tokenizer.image_token_id
    config = transformers.Florence2Config(vision_config=vision, text_config=text, image_token_id=image)
    torch.manual_seed(0)
    transformers.Florence2ForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    pictures = transformers.CLIPImageProcessor(size=size, crop_size=size)
    pictures.image_seq_length = 5
    transformers.Florence2Processor(pictures, tokenizer).save_pretrained(folder)


def test_florence_is_asked_by_its_task(tmp_path):
    """What a random one says is noise, but it was asked, with the picture."""
    save_florence(tmp_path)
    captioner, seen = load(tmp_path, caption_tokens=4, captioner_prompt="<CAPTION>"), []
    generate = captioner._model.generate
    captioner._model.generate = lambda **options: seen.append(options) or generate(**options)
    results = captioner.caption(PICTURES[:3])
    assert all(result["caption"] or result["caption_reason"] for result in results) and len(results) == 3
    [asked] = seen
    assert asked["pixel_values"].shape == (3, 3, 64, 64) and asked["do_sample"] is False
    question = captioner._processor.batch_decode(asked["input_ids"], skip_special_tokens=True)
    assert {text.replace("Ġ", " ").replace(" ", "") for text in question} == {"Whatdoestheimagedescribe?"}
