"""Deliberate bugs of mixtures of sources, each with the test that has to catch it."""

from __future__ import annotations

from planted_training import Mutant

ORDER, RECORDS, SAMPLES = "training/data/order.py", "rwkv_clip/data/mixture.py", "training/data/samples.py"
RESUMED = "training/checkpointing.py"
UNIT, RUNS = "unit/test_mixture.py", "unit/test_mixture_runs.py"
MIXTURE = [
    Mutant(
        "a source is drawn for every sample",
        ORDER,
        "slots = np.asarray(self._mix.at(position))",
        "slots = (hash64(MIXED, position) % np.uint64(self.count)).astype(np.int64)",
        f"{UNIT}::test_shares_are_exact_and_records_of_a_source_come_equally_often",
    ),
    Mutant(
        "every pass of a source has a permutation of its own",
        ORDER,
        "keys = hash64(KEY, self._seeds[numbers], places // self._rounds[numbers])",
        "keys = hash64(KEY, self._seeds[numbers], passes)",
        f"{UNIT}::test_shares_are_exact_and_records_of_a_source_come_equally_often",
    ),
    Mutant(
        "all passes of a source have one permutation",
        ORDER,
        "keys = hash64(KEY, self._seeds[numbers], places // self._rounds[numbers])",
        "keys = hash64(KEY, self._seeds[numbers], 0 * passes)",
        f"{UNIT}::test_half_of_a_source_is_another_half_in_the_next_round",
    ),
    Mutant(
        "every epoch begins its sources anew",
        ORDER,
        "return numbers, position // self.count * samples + slots - (self._ends[numbers] - samples)",
        "return numbers, slots - (self._ends[numbers] - samples)",
        f"{UNIT}::test_shares_are_exact_and_records_of_a_source_come_equally_often",
    ),
    Mutant(
        "what comes again in an epoch is cropped alike",
        ORDER,
        "return index.reshape(where.shape), passes.reshape(where.shape)",
        "return index.reshape(where.shape), where // self.count",
        f"{UNIT}::test_a_record_that_comes_again_in_an_epoch_looks_and_reads_otherwise",
    ),
    Mutant(
        "a bad record gives its place to the next of any source",
        ORDER,
        "index, passes = self._find(numbers, places + turn)",
        "index, passes = self.find(np.array([position + turn]))",
        f"{UNIT}::test_a_bad_record_gives_its_place_to_one_of_its_source",
    ),
    Mutant(
        "of several that do not decode in a row the first stand-in is tried again",
        SAMPLES,
        "sample = self._next_good(fault, sample.turn)",
        "sample = self._next_good(fault, 0)",
        f"{UNIT}::test_records_in_a_row_that_do_not_decode",
    ),
    Mutant(
        "bad records are not counted by source",
        SAMPLES,
        'source = f" in {self.records.source_of(index)}" if isinstance(self.records, Mixture) else ""',
        'source = ""',
        f"{UNIT}::test_bad_records_are_named_by_source_when_they_are_too_many",
    ),
    Mutant(
        "all sources begin with record 0",
        ORDER,
        " + self._offsets[numbers], passes",
        ", passes",
        f"{UNIT}::test_no_record_has_a_pass_twice_and_none_is_left_out",
    ),
    Mutant(
        "one source has the order of a mixture",
        RECORDS,
        "    if len(names) == 1 and shares == [1]:\n        return open_source(spec)\n",
        "",
        f"{UNIT}::test_one_source_with_the_factor_1_is_itself",
    ),
    Mutant(
        "samples of an epoch are rounded down",
        RECORDS,
        "self.factor + Fraction(1, 2))",
        "self.factor)",
        f"{UNIT}::test_samples_are_rounded_and_halves_go_up",
    ),
    Mutant(
        "factors are what floating point makes of them",
        RECORDS,
        "Fraction(Decimal(part.strip()))",
        "Fraction(value)",
        f"{UNIT}::test_factors_are_what_is_written",
    ),
    Mutant(
        "texts that only some sources have are kept",
        RECORDS,
        "return image, tokens[: len(self.layout.text_names)]",
        "return image, tokens",
        f"{UNIT}::test_sources_with_other_numbers_of_texts",
    ),
    Mutant(
        "a factor too many is left aside",
        RECORDS,
        "if len(shares) > len(names):",
        "if False:",
        f"{UNIT}::test_what_does_not_fit_is_named",
    ),
    Mutant(
        "an epoch has as many samples as there are records",
        "training/main.py",
        "state = TrainState(model, work.objective, settings, world, work.records.epoch_samples)",
        "state = TrainState(model, work.objective, settings, world, len(work.records))",
        f"{RUNS}::test_what_a_run_says_and_stores",
    ),
    Mutant(
        "a resumed run looks at its first source only",
        RESUMED,
        "other = [(old, new) for old, new in pairs if",
        "other = [(old, new) for old, new in pairs[:1] if",
        f"{RUNS}::test_other_sources_are_refused_by_name_unless_allowed",
    ),
    Mutant(
        "a run resumes with other factors",
        RESUMED,
        'old.get("samples") != new["samples"] for',
        'old.get("samples") != old.get("samples") for',
        f"{RUNS}::test_other_sources_are_refused_by_name_unless_allowed",
    ),
    Mutant(
        "ranks compare their first source only",
        "training/checks.py",
        'enumerate(facts["sources"], 1)',
        'enumerate(facts["sources"][:1], 1)',
        f"{RUNS}::test_a_rank_with_another_source_is_named",
    ),
    Mutant(
        "only the first source is held against the model",
        "training/checks.py",
        "for name, part in parts.items() for problem in",
        "for name, part in [*parts.items()][:1] for problem in",
        f"{RUNS}::test_each_source_is_held_against_the_model",
    ),
]
