"""Deliberate bugs in the describing jobs, each with the test that has to catch it."""

from __future__ import annotations

from planted_training import Mutant

KILLS, JOB, RUN = "faults/test_describe_kills.py::", "unit/test_describe_job.py::", "unit/test_describe_run.py::"
VERIFY, CLIENT = (f"unit/test_describe_{name}.py" for name in ("verify", "client"))
TOKENS = "unit/test_describe_tokens.py"

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
    Mutant(
        "an answer that is cut counts",
        "describe/answers.py",
        '    if finish in _CUT:\n        return "cut at max_tokens"\n',
        "",
        "unit/test_describe_answers.py",
    ),
    Mutant(
        "redirects are followed, with the key",
        "describe/client.py",
        '/chat/completions", data=data, allow_redirects=False)',
        '/chat/completions", data=data, allow_redirects=True)',
        CLIENT,
    ),
    Mutant(
        "an answer may have any size",
        "describe/client.py",
        "            if size > self.limits.most_bytes:",
        "            if size > 1 << 40:",
        CLIENT,
    ),
    Mutant(
        "a server that asks for time is asked at once",
        "describe/client.py",
        "            self._not_before = max(",
        "            self._not_bfore = max(",
        CLIENT,
    ),
    Mutant(
        "a row's text may hold places of the prompt",
        "describe/prompt.py",
        "    return _PLACE.sub(lambda match: values.get(match[1], match[0]), template)",
        "    return template.format(**values)",
        "unit/test_describe_prompt.py",
    ),
    Mutant(
        "tokens of answers that were of no use are not counted",
        "describe/composers/openai.py",
        "            tally.add(answer)\n            try",
        "            try",
        "unit/test_describe_composers.py",
    ),
]
