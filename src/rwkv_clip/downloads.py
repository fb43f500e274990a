"""What is fetched from the network: by name only, through huggingface_hub, with an error in words where that fails.

Nothing here is needed for weights that lie on this machine, and nothing that is fetched is run.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from .config import ConfigError
from .errors import is_out_of_memory

_NETWORK = ("httpx", "httpcore", "requests", "urllib", "huggingface_hub", "ssl")  # modules of network errors


def load_client() -> ModuleType:
    """huggingface_hub. ImportError that says what to install."""
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError("hf-hub: names need huggingface_hub; pip install huggingface_hub") from None
    return huggingface_hub


def split_name(name: str) -> tuple[str, str | None]:
    """`org/name` or `org/name@revision` -> repository, revision. ConfigError for anything else."""
    repository, _, revision = name.partition("@")
    parts = repository.split("/")
    plain = all(
        part and part.strip(".-") and part.replace("-", "").replace(".", "").replace("_", "").isalnum()
        for part in parts
    )
    if len(parts) != 2 or not plain or ("@" in name and not revision):
        raise ConfigError([f"hf-hub: {name!r} is not of the form org/name or org/name@revision; correct it"])
    return repository, revision or None


def fetch_first(name: str, files: Sequence[str], cache: str | Path | None = None) -> Path | None:
    """The first of `files` that the repository `name` has, in huggingface_hub's cache (or the folder `cache`); None if
    it has none of them. ConfigError where it cannot be reached and is not in the cache."""
    client, (repository, revision) = load_client(), split_name(name)
    unreachable = None
    with fetching("hf-hub", name):
        for file in files:
            try:
                return Path(client.hf_hub_download(repository, file, revision=revision, cache_dir=cache))
            except client.errors.LocalEntryNotFoundError as error:  # no network: the cache may have another of them
                unreachable = unreachable or error
            except client.errors.EntryNotFoundError:
                continue
        if unreachable:
            raise unreachable
    return None


@contextlib.contextmanager
def fetching(field: str, what: str) -> Iterator[None]:
    """While open_clip may fetch `what` from the network: a ConfigError that names it if that fails.

    Its libraries raise many kinds of errors, one caused by the other: a failed download has a system's or a network's
    error somewhere in that chain. An error of this machine (a full disk, no memory) is raised unchanged.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
            chain.append(cause)
        if own := next(filter(_is_of_this_machine, chain), None):
            raise own from None
        if not any(isinstance(e, OSError) or type(e).__module__.startswith(_NETWORK) for e in chain):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            [
                f"{field}: {what!r} must be downloaded once, which failed ({reason[:200]}); run it where there is a "
                "network, copy its cache (~/.cache/huggingface) here, or give the weights as a file"
            ]
        ) from error


def _is_of_this_machine(error: BaseException) -> bool:
    """Whether a disk is full or not writable, or memory ran out."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    closed = isinstance(error, PermissionError) and error.filename is not None
    return full or closed or is_out_of_memory(error)
