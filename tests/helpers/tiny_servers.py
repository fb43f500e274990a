"""Real servers with tiny random models: llama.cpp's (in this process) and transformers' (a process of its own).

What they say is noise; protocol, schemas, errors and usage are real.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def write_gguf(path: Path, width: int = 64, layers: int = 2, seed: int = 0) -> None:
    """A random Llama whose tokens are bytes, 0.5 MB, with a context of 8,192."""
    import gguf

    rng = np.random.default_rng(seed)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 2)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, *shape: int, scale: float) -> None:
        values = rng.standard_normal(shape) * scale if scale else np.ones(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))

    add("token_embd", len(tokens), width, scale=1.0)
    add("output_norm", width, scale=0)
    add("output", len(tokens), width, scale=0.2)
    for layer in range(layers):
        add(f"blk.{layer}.attn_norm", width, scale=0)
        add(f"blk.{layer}.ffn_norm", width, scale=0)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}", width, width, scale=0.5 / width**0.5)
        add(f"blk.{layer}.ffn_gate", 2 * width, width, scale=0.5 / width**0.5)
        add(f"blk.{layer}.ffn_up", 2 * width, width, scale=0.5 / width**0.5)
        add(f"blk.{layer}.ffn_down", width, 2 * width, scale=0.3 / width**0.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def llama_server(path: Path, slots: int = 4, context: int = 4096) -> Iterator[str]:
    """The address of llama.cpp's server in this process. context: tokens of each slot."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel = slots * context, slots
    settings.cpuparams.n_threads = 1
    settings.warmup, settings.verbosity = False, -1
    server = xllamacpp.Server(settings)
    yield server.listening_address
    del server


def write_llama(folder: Path) -> None:
    """A random Llama of transformers' with byte-level tokens, 0.5 MB, that answers in about 30 letters and blanks."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {token: place for place, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape, **more)).eval()
    with torch.no_grad():
        # All states share a direction, along which letters get a logit of 6, and the end of the answer a higher one.
        model.model.embed_tokens.weight += torch.randn(64) * 0.1
        shared = model.model(torch.randint(2, len(words), (1, 512))).last_hidden_state[0].mean(0)
        model.lm_head.weight *= 0.2
        for token, place in words.items():
            logit = 7.0 if place == 1 else 6.0 if (token.isascii() and token.isalpha()) or token == "\u0120" else 0.0
            model.lm_head.weight[place] += logit * shared / shared.square().sum()
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, bos_token_id=0, eos_token_id=1)
    model.save_pretrained(folder)


@contextlib.contextmanager
def transformers_server(folder: Path, seconds: float = 90) -> Iterator[str]:
    """The address of `transformers serve`, without a hub, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + seconds
        while True:
            assert process.poll() is None and time.monotonic() < end, "transformers serve does not come up"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=1):
                break
            time.sleep(0.1)
        yield address
    finally:
        process.kill()
        process.wait()
