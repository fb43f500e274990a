"""Deliberate bugs in the describing jobs, each with the test that has to catch it."""

from __future__ import annotations

from planted_training import Mutant

KILLS, JOB, RUN = "faults/test_describe_kills.py::", "unit/test_describe_job.py::", "unit/test_describe_run.py::"
VERIFY, RULES, CLIENT = (f"unit/test_describe_{name}.py" for name in ("verify", "rules", "client"))
EXPORT, TOKENS = "unit/test_describe_export.py", "unit/test_describe_tokens.py"

DESCRIBE = [
    Mutant(
        "a journal is not read again",
        "describe/job.py",
        "for entry in _read_journal(file.with_suffix(",
        "for entry in [] and _read_journal(file.with_suffix(",
        KILLS + "test_twenty_kills_ask_again_only_for_what_was_under_way",
    ),
    Mutant(
        "results are written as they came",
        "describe/work.py",
        "[found[key] for key in keys]",
        "list(found.values())",
        JOB + "test_rows_come_out_in_order_and_are_asked_for_once",
    ),
    Mutant(
        "a torn line is appended to",
        "describe/job.py",
        "            self._file.truncate(whole)\n",
        "            pass\n",
        JOB + "test_a_torn_journal_costs_its_last_line_only",
    ),
    Mutant(
        "failed rows are finished rows",
        "describe/job.py",
        "            found = {key: row for key, row in found.items() if not stage.has_failed(row)}\n",
        "            pass\n",
        JOB + "test_failed_rows_keep_their_place_and_are_tried_again",
    ),
    Mutant(
        "a changed row keeps its former text",
        "describe/job.py",
        "        values = [row.get(name) for name in self.inputs]\n",
        "        values = []\n",
        JOB + "test_the_input_may_grow_and_change",
    ),
    Mutant(
        "a changed setting is not noticed",
        "describe/job.py",
        "        if differing and not new_run:\n",
        "        if False:\n",
        RUN + "test_a_changed_setting_is_refused_by_name",
    ),
    Mutant(
        "every shard makes all parts",
        "describe/executors.py",
        "[which::of]",
        "",
        RUN + "test_shards_workers_and_ray_make_the_same_rows",
    ),
    Mutant(
        "new numbers are let through",
        "describe/verify.py",
        '(("numbers", numbers), ("names", names))',
        '(("names", names),)',
        VERIFY,
    ),
    Mutant(
        "a text that the rules wrote is not cut to the context",
        "describe/tokens.py",
        "return count_tokens(text) <= context",
        "return True",
        TOKENS,
    ),
]
