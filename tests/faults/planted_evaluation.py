"""Deliberate bugs of evaluation during a run, each with the test that has to catch it; `mutants.py` plants them."""

from __future__ import annotations

from planted_training import Mutant

RUN, BEST, RANKS = "unit/test_evaluation.py", "unit/test_best.py", "dist/test_evaluation_ranks.py"
EVALUATION = [
    Mutant(
        "a signal waits for the end of an evaluation",
        "training/evaluation.py",
        "        if preemption.signal:\n",
        "        if False:\n",
        f"{RUN}::test_a_signal_ends_an_evaluation_at_the_next_block",
    ),
    Mutant(
        "only the rank that is told ends an evaluation",
        "training/evaluation.py",
        "                    if preemption.agree(world):\n",
        "                    if preemption.signal:\n",
        f"{RANKS}::test_a_signal_to_one_rank_ends_the_evaluation_on_all",
    ),
    Mutant(
        "what a resumed run made up for is done again",
        "training/loop.py",
        "saves = saves or better or saved == step",
        "saves = saves or better",
        f"{RUN}::test_a_signal_ends_an_evaluation_at_the_next_block",
    ),
    Mutant(
        "an evaluation that was interrupted counts as done",
        "training/loop.py",
        "            found = None\n",
        "            found = {}\n",
        f"{RUN}::test_a_signal_ends_an_evaluation_at_the_next_block",
    ),
    Mutant(
        "a set that is lost ends the run",
        "training/evaluation.py",
        "                    if world.is_main:\n                        log.error",
        "                    if True:\n                        raise\n                    if world.is_main:\n"
        "                        log.error",
        f"{RUN}::test_a_set_that_is_lost_ends_no_run",
    ),
    Mutant(
        "each rank evaluates its own batch norms",
        "training/parallel.py",
        "        dist.broadcast(of_main, src=0)\n",
        "",
        f"{RANKS}::test_batch_norms_have_the_statistics_of_the_checkpoint",
    ),
    Mutant(
        "batch norms of all ranks go on with those of one",
        "training/parallel.py",
        "            buffer.copy_(before)\n",
        "            pass\n",
        f"{RANKS}::test_batch_norms_have_the_statistics_of_the_checkpoint",
    ),
    Mutant(
        "ranks may see other pictures",
        "training/evaluation.py",
        "for one in sets if world.size > 1 else ():",
        "for one in ():",
        f"{RANKS}::test_ranks_that_see_other_data_are_told_so",
    ),
    Mutant(
        "the best checkpoint is removed when it is old",
        "rwkv_clip/checkpoint.py",
        " and path != find_best(folder)]",
        "]",
        f"{BEST}::test_the_best_stays",
    ),
    Mutant(
        "the best checkpoint is the last of equal ones",
        "training/best.py",
        "not sign * value <= sign * before",
        "not sign * value < sign * before",
        f"{BEST}::test_better_is_higher_and_of_losses_lower",
    ),
    Mutant(
        "the highest loss is the best",
        "training/best.py",
        'sign = -1 if metric.endswith("loss") else 1',
        "sign = 1",
        f"{BEST}::test_the_best_of_the_validation_by_loss_is_the_lowest",
    ),
    Mutant(
        "what is the best is forgotten on resume",
        "training/checkpointing.py",
        'facts.get("evaluated", 0), facts.get("best", {})',
        'facts.get("evaluated", 0), {}',
        f"{BEST}::test_a_run_that_is_killed_before_the_best_is_named",
    ),
    Mutant(
        "a best checkpoint that was not written counts",
        "training/checkpointing.py",
        "        if best:\n            recall_best",
        "        if False:\n            recall_best",
        f"{BEST}::test_a_save_that_fails_is_tried_by_the_next_better_one",
    ),
    Mutant(
        "for an instant there is no best checkpoint",
        "rwkv_clip/checkpoint.py",
        "    os.replace(new, link)\n",
        "    link.unlink(missing_ok=True)\n    os.replace(new, link)\n",
        f"{BEST}::test_there_is_a_best_one_at_any_instant",
    ),
    Mutant(
        "the best checkpoint of the future counts",
        "training/best.py",
        "isinstance(at, int) and 0 <= at <= step",
        "isinstance(at, int) and 0 <= at",
        f"{BEST}::test_what_is_recalled",
    ),
]
