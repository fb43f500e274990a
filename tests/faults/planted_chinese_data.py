"""Deliberate bugs in how Chinese-CLIP's data are read and written, each with the test that has to catch it."""

from __future__ import annotations

from planted_training import Mutant

HOSTILE, RECORDS = "faults/test_lmdb_hostile.py::", "unit/test_lmdb.py::"
BUILDER, RIGHT = "unit/test_lmdb_build.py::", "unit/test_right_images.py::"
SOURCES, PARITY = "unit/test_chinese_clip_sources.py::", "parity/test_chinese_clip_data.py::"
LMDB, BUILD, PICKLE = "rwkv_clip/data/lmdb.py", "rwkv_clip/data/lmdb_build.py", "rwkv_clip/data/pair_pickle.py"

CHINESE_DATA = [
    Mutant(
        "what follows a pickle is not looked at",
        PICKLE,
        "if scan.at != len(data):",
        "if scan.at > len(data):",
        HOSTILE + "test_attacks_run_nothing",
    ),
    Mutant(
        "any opcode may end the tuple",
        PICKLE,
        "if code != _TUPLE3:",
        "if code in _TEXTS:",
        HOSTILE + "test_the_place_is_named",
    ),
    Mutant(
        "a frame may reach beyond the value",
        PICKLE,
        "if not length or length > self.end - self.at:",
        "if not length:",
        HOSTILE + "test_the_place_is_named",
    ),
    Mutant(
        "small numbers are read with a sign",
        PICKLE,
        "signed=code == _BININT",
        "signed=True",
        RECORDS + "test_every_pickle_of_a_pair_is_read",
    ),
    Mutant(
        "numbers are written longer than need be",
        PICKLE,
        "if 0 <= value < 1 << 16:",
        "if 0 <= value < 1 << 15:",
        RECORDS + "test_pickles_are_written_as_cpython_writes_them",
    ),
    Mutant(
        "base64 of the url-safe alphabet is damage",
        LMDB,
        "bytes(value).strip().translate(STANDARD)",
        "bytes(value).strip()",
        RECORDS + "test_both_alphabets_of_base64",
    ),
    Mutant(
        "a file that was cut is read on",
        LMDB,
        'if size < pages * environment.stat()["psize"]:',
        "if not size:",
        HOSTILE + "test_a_file_that_was_cut_is_found_before_it_is_read",
    ),
    Mutant(
        "a fork reads through what its parent has opened",
        LMDB,
        "if process != os.getpid():  # inherited by a fork",
        "if process == -1:",
        RECORDS + "test_copies_and_forks_open_their_own",
    ),
    Mutant(
        "pictures do not count in the digest",
        LMDB,
        "total.update(self.picture(self.pair(i).image_id)[:BEGINNING])",
        "self.picture(self.pair(i).image_id)",
        RECORDS + "test_other_contents_have_another_digest",
    ),
    Mutant(
        "records of an LMDB are not prepared",
        LMDB,
        "tokenizer(prepare_texts(tokenizer, [text]))",
        "tokenizer([text])",
        RECORDS + "test_a_tokenizer_prepares_the_texts",
    ),
    Mutant(
        "a map that is full stays full",
        LMDB,
        "            except _MapFull:\n",
        "            except NotImplementedError:\n",
        BUILDER + "test_a_map_grows_by_need",
    ),
    Mutant(
        "an interrupted build forgets where it was",
        BUILD,
        'return state["end"], state["number"]',
        "return 0, 0",
        HOSTILE + "test_killed_anywhere_and_started_again_gives_the_same_content",
    ),
    Mutant(
        "a split appears before it is whole",
        BUILD,
        '(target / f"{name}{ending}" for ending in ("", ".part", ".old"))',
        '(target / f"{name}{ending}" for ending in ("", "", ".old"))',
        HOSTILE + "test_killed_anywhere_and_started_again_gives_the_same_content",
    ),
    Mutant(
        "num_images counts the lines",
        BUILD,
        'images.put([(IMAGES, b"%d" % self.report.images)]',
        'images.put([(IMAGES, b"%d" % self.report.lines)]',
        BUILDER + "test_ids_that_come_twice",
    ),
    Mutant(
        "pairs are in the order of their keys",
        BUILD,
        'waiting.append((b"%d" % report.pairs, value))',
        'waiting.append((b"%02d" % report.pairs, value))',
        PARITY + "test_keys_and_values_are_those_of_the_released_builder",
    ),
    Mutant(
        "equal texts stay apart",
        "rwkv_clip/data/pairs.py",
        "found.texts.setdefault(prepared, (text, {}))",
        "found.texts.setdefault(text, (text, {}))",
        SOURCES + "test_a_folder_and_a_table_become_numbered_files",
    ),
    Mutant(
        "a right image beside the best one counts as wrong",
        "rwkv_clip/metrics.py",
        '.scatter_reduce(0, caption, own, "amax")',
        '.scatter_reduce(0, caption, own, "amin", include_self=False)',
        RIGHT + "test_ranks_equal_brute_force",
    ),
    Mutant(
        "a text without images is found where k is large",
        "rwkv_clip/metrics.py",
        "of_text[torch.isneginf(best_image)] = NEVER",
        "of_text[torch.isneginf(best_image)] += 0",
        RIGHT + "test_a_text_without_a_picture_is_a_query_that_finds_nothing",
    ),
]
