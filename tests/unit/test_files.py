"""Files and folders: written whole or not at all, and made once."""

from threading import Barrier, Thread

import pytest

from rwkv_clip.files import new_folder, write_whole


def test_a_new_folder_never_is_an_old_one(tmp_path):
    names = [new_folder(tmp_path / "runs" / "a.b").name for _ in range(3)]
    assert names == ["a.b", "a.b-2", "a.b-3"] and all((tmp_path / "runs" / name).is_dir() for name in names)
    (tmp_path / "runs" / "file").touch()
    assert new_folder(tmp_path / "runs" / "file").name == "file-2"


def test_two_that_make_a_folder_at_once_get_two(tmp_path):
    made, start = [], Barrier(8)

    def make():
        start.wait()
        made.append(new_folder(tmp_path / "run"))

    threads = [Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8 and sorted(tmp_path.iterdir()) == sorted(made)


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    write_whole(tmp_path / "a", [b"old"])

    def pieces():
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", pieces())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]
