"""Deliberate bugs of SigLIP and of distillation, each with the test that has to catch it; `mutants.py` plants them."""

from __future__ import annotations

from planted_training import Mutant

SIGLIP, DISTILL, PARITY = "unit/test_siglip.py", "unit/test_distill.py", "parity/test_objectives.py"
OBJECTIVES = [
    Mutant(
        "SigLIP: repeats are negatives",
        "rwkv_clip/losses/siglip.py",
        "in score_chunks(image, texts, scale, first, keys):",
        "in score_chunks(image, texts, scale, first, None):",
        f"{SIGLIP}::test_every_chunk_height_is_the_dense_formula",
    ),
    Mutant(
        "SigLIP: a positive is pushed apart",
        "rwkv_clip/losses/siglip.py",
        "        positives.neg_()\n        d_bias",
        "        d_bias",
        f"{PARITY}::test_siglip",
    ),
    Mutant(
        "SigLIP: every rank takes the first texts for its own",
        "rwkv_clip/losses/siglip.py",
        "comparison_dtype(image), rank_and_size()[0] * len(image)",
        "comparison_dtype(image), 0",
        "dist/test_siglip_ranks.py::test_ranks_are_one_process",
    ),
    Mutant(
        "SigLIP: small losses are rounded away",
        "rwkv_clip/losses/siglip.py",
        "e.sub_(u - 1).div_(u).add_(u.log_())",
        "u.log_()",
        f"{SIGLIP}::test_small_losses_keep_their_digits",
    ),
    Mutant(
        "SigLIP: the scale is cut at 100",
        "training/trainer.py",
        "clamp_(*state.objective.scale_limits)",
        "clamp_(0, 4.605170185988092)",
        f"{SIGLIP}::test_a_large_scale_is_kept",
    ),
    Mutant(
        "a bias that weights do not have begins with 0",
        "rwkv_clip/weights.py",
        "state[BIAS] = own[BIAS].clone()",
        "state[BIAS] = torch.zeros_like(own[BIAS])",
        f"{SIGLIP}::test_weights_without_a_bias_get_one_and_say_so",
    ),
    Mutant(
        "the temperature of weights is begun anew",
        "training/main.py",
        'weights["pretrained"] is None and own.get',
        "own.get",
        f"{SIGLIP}::test_weights_without_a_bias_get_one_and_say_so",
    ),
    Mutant(
        "the description of a trained model forgets its bias",
        "rwkv_clip/models/two_tower.py",
        'bias = {} if self.init_logit_bias is None else {"init_logit_bias": self.init_logit_bias}',
        "bias = {}",
        f"{SIGLIP}::test_who_reads_a_checkpoint_gets_the_bias",
    ),
    Mutant(
        "distillation: a rank's columns are those of its own images",
        "rwkv_clip/losses/distill.py",
        "sums = sum_over_ranks(columns[:, 1:] * (columns[:, :1] - top[:, None]).exp())",
        "sums = columns[:, 1:] * (columns[:, :1] - top[:, None]).exp()",
        f"{PARITY}::test_distillation_on_ranks",
    ),
    Mutant(
        "distillation: the teacher's columns have the student's maxima",
        "rwkv_clip/losses/distill.py",
        "values.sub_(columns[i, 0])",
        "values.sub_(columns[0, 0])",
        f"{PARITY}::test_distillation",
    ),
    Mutant(
        "the teacher sees the first micro-batch again and again",
        "training/gradients.py",
        "self.objective.observe(inputs.image[rows], inputs.text[rows])",
        "self.objective.observe(inputs.image[: self.micro_batches.size], inputs.text[rows])",
        f"{DISTILL}::test_gradients_in_micro_batches",
    ),
    Mutant(
        "a run resumes with another teacher",
        "training/checkpointing.py",
        "for key in dict.fromkeys((*begun, *sources))]",
        "for key in ()]",
        f"{DISTILL}::test_another_teacher_is_another_run",
    ),
    Mutant(
        "each rank has a teacher of its own",
        "training/checks.py",
        '    if objective.sources and world.size > 1:\n        judge_all(world, "sources"',
        '    if False:\n        judge_all(world, "sources"',
        "dist/test_distill_ranks.py::test_ranks_have_one_teacher",
    ),
    Mutant(
        "an image without stored features is taught nothing in silence",
        "training/teachers.py",
        "if absent.any():",
        "if False:",
        f"{DISTILL}::test_stored_features_are_those_of_the_model",
    ),
    Mutant(
        "a teacher reads texts without its padding",
        "training/teachers.py",
        "(0, self.context - text.shape[-1]), value=self.padding)",
        "(0, 0), value=self.padding)",
        f"{DISTILL}::test_a_teacher_gets_what_its_own_tokenizer_makes",
    ),
]
