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
PATIENCE = 10  # seconds that the hub has to answer; the client asks six times for each file, within 23 seconds


def load_client() -> ModuleType:
    """huggingface_hub. ImportError that says what to install."""
    try:
        import huggingface_hub
        import huggingface_hub.constants  # it loads names when they are first asked for, but not these modules
        import huggingface_hub.utils
    except ImportError:
        raise ImportError("hf-hub: names need huggingface_hub; pip install huggingface_hub") from None
    return huggingface_hub


def split_name(name: str) -> tuple[str, str | None]:
    """`org/name` or `org/name@revision` -> repository, revision. ConfigError for anything else."""
    repository, _, revision = name.partition("@")
    parts = repository.split("/")
    # A revision may be a branch such as refs/pr/1; it names a file of the cache, so it must not lead out of it.
    plain = all(map(_is_plain, (*parts, *(revision.split("/") if "@" in name else ()))))
    if len(parts) != 2 or not plain:
        raise ConfigError([f"hf-hub: {name!r} is not of the form org/name or org/name@revision; correct it"])
    return repository, revision or None


def _is_plain(part: str) -> bool:
    """Whether it is made of letters, digits, `-`, `_` and `.`, and is neither `.` nor `..`."""
    return bool(part.strip(".-")) and part.replace("-", "").replace(".", "").replace("_", "").isalnum()


def fetch_first(name: str, files: Sequence[str], cache: str | Path | None = None) -> Path | None:
    """The first of `files` that the repository `name` has, in huggingface_hub's cache (or the folder `cache`); None if
    it has none of them. ConfigError where it cannot be reached and is not in the cache."""
    repository, revision = split_name(name)
    return _fetch(repository, files, name, revision, cache)


def fetch_file(repository: str, file: str) -> Path | None:
    """The same for one file of a repository whose name may have no organisation, as the oldest ones."""
    split_name(repository if "/" in repository else f"old/{repository}")
    return _fetch(repository, (file,), repository)


def _fetch(
    repository: str, files: Sequence[str], name: str, revision: str | None = None, cache: str | Path | None = None
) -> Path | None:
    client = load_client()
    obstacle = find_obstacle(client)
    unreachable = None
    with fetching("hf-hub", name, obstacle):
        offline = {"local_files_only": True} if obstacle else {}
        for file in files:
            try:
                return Path(client.hf_hub_download(repository, file, revision=revision, cache_dir=cache, **offline))
            except client.errors.LocalEntryNotFoundError as error:  # no network: the cache may have another of them
                unreachable = unreachable or error
            except client.errors.EntryNotFoundError:
                continue
        if unreachable:
            raise unreachable
    return None


def find_obstacle(client: ModuleType) -> str | None:
    """Why the hub does not answer; None where it does, whatever it says, or is not to be asked (HF_HUB_OFFLINE)."""
    if client.constants.HF_HUB_OFFLINE:
        return None
    try:
        client.utils.get_session().head(client.constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # of the client's library, which versions change
        return f"{client.constants.ENDPOINT}: {first_line(error)}"
    return None


@contextlib.contextmanager
def asking_once(field: str, what: str) -> Iterator[None]:
    """`fetching` for libraries that ask the hub themselves: where it does not answer they look into its cache only,
    instead of asking again for half a minute."""
    client = load_client()
    obstacle = find_obstacle(client)
    before = client.constants.HF_HUB_OFFLINE
    client.constants.HF_HUB_OFFLINE = before or obstacle is not None  # they read it there
    try:
        with fetching(field, what, obstacle):
            yield
    finally:
        client.constants.HF_HUB_OFFLINE = before  # they read it there


@contextlib.contextmanager
def fetching(field: str, what: str, obstacle: str | None = None) -> Iterator[None]:
    """While open_clip may fetch `what` from the network: a ConfigError that names it if that fails, and why (or
    `obstacle`, if that is known).

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
        if not any(map(is_of_the_network, chain)):
            raise
        raise ConfigError(
            [
                f"{field}: {what!r} must be downloaded once, which failed ({obstacle or first_line(error)}); run it "
                "where there is a network, copy its cache (~/.cache/huggingface) here, or give the weights as a file"
            ]
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, or its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def is_of_the_network(error: BaseException) -> bool:
    """Whether a connection, or a server's answer, is the reason; any error of the system, too."""
    return isinstance(error, OSError) or type(error).__module__.startswith(_NETWORK)


def _is_of_this_machine(error: BaseException) -> bool:
    """Whether a disk is full or not writable, or memory ran out."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    closed = isinstance(error, PermissionError) and error.filename is not None
    return full or closed or is_out_of_memory(error)
