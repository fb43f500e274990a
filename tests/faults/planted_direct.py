"""Deliberate bugs in how data are read directly, each with the test that has to catch it."""

from __future__ import annotations

from planted_training import Mutant

ROWS, TRAINED = "unit/test_direct_rows.py::", "unit/test_direct_training.py::"
SET, LINES, PAGES = (f"rwkv_clip/data/direct/{name}.py" for name in ("direct_set", "lines", "pages"))
INDEX, TAR, STORAGE = (f"rwkv_clip/data/direct/{name}.py" for name in ("index_file", "tar_table", "storage"))

DIRECT = [
    Mutant(
        "the last of several captions is never drawn",
        SET,
        "min(int(drawn * len(captions)), len(captions) - 1)",
        "int(drawn * (len(captions) - 1))",
        TRAINED + "test_a_caption_is_drawn_for_each_sample_and_epoch",
    ),
    Mutant(
        "a sample has the same caption in every epoch",
        "training/data/samples.py",
        "draw_caption(self.seed, epoch, index)",
        "draw_caption(self.seed, 0, index)",
        TRAINED + "test_a_caption_is_drawn_for_each_sample_and_epoch",
    ),
    Mutant(
        "a digest is not of the rows",
        SET,
        "            table.add_to(total)\n",
        "",
        TRAINED + "test_a_digest_is_of_the_content",
    ),
    Mutant(
        "a tar's digest leaves out its texts",
        TAR,
        "digest.update(tar.read(member.size))",
        "pass",
        TRAINED + "test_a_digest_is_of_the_content",
    ),
    Mutant(
        "an index serves a tar of another size",
        INDEX,
        'if found.facts["size"] != stored.size:',
        "if False:",
        ROWS + "test_a_tar_that_was_cut_or_changed_is_named",
    ),
    Mutant(
        "an index serves another tar of the same size",
        INDEX,
        'if facts["digest"] != found.facts["digest"]:',
        "if False:",
        ROWS + "test_a_tar_that_was_cut_or_changed_is_named",
    ),
    Mutant(
        "a damaged index is believed",
        INDEX,
        'if zlib.crc32(data) != facts["crc32"] or',
        "if",
        ROWS + "test_a_damaged_index_is_made_anew",
    ),
    Mutant(
        "places are kept of other rows after the first piece",
        LINES,
        "np.arange(-rows % every",
        "np.arange(0 % every",
        ROWS + "test_lines_by_number",
    ),
    Mutant(
        "a value that is not there takes the place of the next",
        PAGES,
        "decode_hybrid(body, LENGTH.size, at, most.bit_length(), count) == most",
        "decode_hybrid(body, LENGTH.size, at, most.bit_length(), count) >= 0",
        ROWS + "test_parquet_by_number",
    ),
    Mutant(
        "a file that ends early gives what it has",
        STORAGE,
        "if len(data) != end - start:",
        "if False:",
        ROWS + "test_a_file_that_changes_is_an_error_of_the_row",
    ),
]
