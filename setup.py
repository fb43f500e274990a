"""Packaging. src/training, eval, describe and search install as rwkv_clip.training, .eval, .describe, .search."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements() -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line]


HOMES = {
    "rwkv_clip": "src/rwkv_clip",
    "rwkv_clip.training": "src/training",
    "rwkv_clip.eval": "src/eval",
    "rwkv_clip.describe": "src/describe",
    "rwkv_clip.search": "src/search",
}


def found(name: str, folder: str) -> list[str]:
    """A package and all packages in it."""
    return [name, *(f"{name}.{inner}" for inner in find_packages(ROOT / folder))]


CLIP_BENCHMARK = ["clip-benchmark>=1.6", "requests"]  # which it imports without saying so
CHINESE = ["lmdb>=1.4", "pybase64>=1.3"]  # Chinese-CLIP's data folders
DESCRIBE = ["pyarrow>=15", "aiohttp>=3.9"]
SERVERS = ["xllamacpp", "gguf", "transformers[serving]>=5", "ray[data]>=2.40"]  # what describe is tested against
SEARCH = ["starlette>=0.40", "uvicorn>=0.30"]
ONNX = ["onnx>=1.16", "onnxscript", "onnxruntime>=1.18"]
LORA = ["peft>=0.14", "accelerate", "psutil", "transformers>=4.48"]  # the last three are imported by peft
CHECKS = ["pytest>=8", "pytest-xdist>=3.5", "ruff>=0.9", "mypy>=1.15"]
DEVELOPMENT = [*CHECKS, *LORA, "pyarrow>=15", "fsspec", "datasets", "tensorboard", "faiss-cpu>=1.8"]

setup(
    name="rwkv_clip",
    version="0.9.0",
    description="Contrastive image-text training with RWKV-6 towers",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    package_dir=HOMES,
    packages=[package for name, folder in HOMES.items() for package in found(name, folder)],
    package_data={
        "": ["*.json"],
        "rwkv_clip": ["py.typed", "configs/**/*.json", "bert-chinese/*"],
        "rwkv_clip.ops": ["csrc/**/*"],
        "rwkv_clip.describe": ["lexicon/*", "prompts/*", "student/*"],
        "rwkv_clip.search": ["page/*"],
    },
    entry_points={
        "console_scripts": [
            "rwkv-clip-train = rwkv_clip.training.main:main",
            "rwkv-clip-eval = rwkv_clip.eval.main:main",
            "rwkv-clip-data = rwkv_clip.data.__main__:main",
            "rwkv-clip-describe = rwkv_clip.describe.__main__:main",
            "rwkv-clip-search = rwkv_clip.search.__main__:main",
        ]
    },
    install_requires=requirements(),
    extras_require={
        "dali": ["nvidia-dali-cuda130>=1.51"],
        "dali-cuda12": ["nvidia-dali-cuda120>=1.43"],
        "parquet": ["pyarrow>=15"],
        "datasets": ["pyarrow>=15"],  # folders that `datasets` saved; the package itself is not needed
        "fsspec": ["fsspec"],
        "s3": ["fsspec", "s3fs"],
        "lora": LORA,
        "chinese": CHINESE,
        "describe": DESCRIBE,
        "ray": [*DESCRIBE, "ray[data]>=2.40"],
        "captioners": [*DESCRIBE, "transformers>=4.48"],
        "vllm": [*DESCRIBE, "vllm>=0.20"],  # brings its own torch: an environment of its own
        "wandb": ["wandb"],
        "trackio": ["trackio"],
        "tensorboard": ["tensorboard"],
        "clip-benchmark": CLIP_BENCHMARK,
        "faiss": ["faiss-cpu>=1.8"],
        "search": SEARCH,
        "usearch": ["usearch>=2"],
        "qdrant": ["qdrant-client>=1.10"],
        "lancedb": ["lancedb>=0.20", "pyarrow>=15"],
        "onnx": ONNX,
        "bench": ["webdataset>=0.2.5,<=0.2.86", "pandas"],  # for open_clip_train's loader, as open_clip bounds them
        "dev": DEVELOPMENT + CLIP_BENCHMARK + CHINESE + DESCRIBE + SERVERS + SEARCH + ONNX,
    },
)
