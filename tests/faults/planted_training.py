"""Deliberate bugs of training, each with the test that has to catch it; `mutants.py` plants them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old` -> `new` in `file` (below src/) must turn `test` (a node or file below tests/) red."""

    name: str
    file: str
    old: str
    new: str
    test: str


ELASTIC = "dist/test_elastic.py"
POSITIVES, POLICIES = "unit/test_positives.py", "unit/test_policies.py"
CRASH, STORAGE = "faults/test_crash_points.py", "faults/test_storage.py"
TRAINING = [
    Mutant(
        "gradients by all-reduce, in its own order",
        "training/deterministic.py",
        "    for bucket in _buckets(tensors):  #",
        "    for tensor in tensors:\n        dist.all_reduce(tensor)\n    for bucket in _buckets([]):  #",
        f"{ELASTIC}::test_same_bits",
    ),
    Mutant(
        "micro-batches added one after the other instead of as a tree",
        "training/deterministic.py",
        "while sums and sums[-1][0] == level:",
        "if sums:\n            level = sums[-1][0] - 1\n        while sums:",
        f"{ELASTIC}::test_same_bits",
    ),
    Mutant(
        "stochastic depth drawn from a generator",
        "training/gradients.py",
        "if inputs.drop_numbers is not None:",
        "if False:",
        f"{ELASTIC}::test_the_mode_matters",
    ),
    Mutant(
        "each rank has an order of its own",
        "training/data/batch.py",
        "begin = self.first(step) + self.rank * self.local_batch",
        "begin = self.first(step) // self.world + self.rank * 10**6",
        f"{ELASTIC}::test_the_mode_matters",
    ),
    Mutant(
        "the second pass draws other dropout",
        "training/gradients.py",
        "torch.manual_seed(int(hash64(self.seed, step, self.micro_batches.first + number)[0] >> 1))",
        "pass",
        "unit/test_step.py::test_the_second_pass_repeats_dropout_and_drop_path",
    ),
    Mutant(
        "negatives of the own micro-batch only",
        "training/gradients.py",
        "        losses, report, gradients = self._compare(features, facts, scale_loss)\n",
        "        rows = [self.micro_batches.rows(number) for number in numbers]\n"
        "        cut = [{k: v[own] if v.dim() else v for k, v in features.items()} for own in rows]\n"
        "        parts = [self._compare(part, {}, scale_loss) for part in cut]\n"
        "        losses, report, found = *parts[0][:2], [part[2] for part in parts]\n"
        "        gradients = {\n"
        "            k: (torch.cat if v.dim() else sum)([x[k] / len(parts) for x in found])\n"
        "            for k, v in features.items()\n"
        "        }\n",
        "unit/test_step.py::test_accumulation_in_float64",
    ),
    Mutant(
        "the temperature's gradient once per micro-batch",
        "training/gradients.py",
        "if value.requires_grad and (last or name not in SCALARS)]",
        "if value.requires_grad]",
        "unit/test_step.py::test_accumulation_in_float64",
    ),
    Mutant(
        "ranks exchange gradients after every micro-batch",
        "training/parallel.py",
        "isinstance(parallel, DistributedDataParallel) and not last else",
        "False else",
        "unit/test_step.py::test_two_ranks_with_accumulation",
    ),
    Mutant(
        "text choice from the global generator",
        "training/data/augment.py",
        "drawn = uniforms(seed, epochs, ids, TEXT)",
        "drawn = np.random.rand(len(ids))",
        "faults/test_resume.py::test_every_stop_point",
    ),
    Mutant(
        "a text of probability 0 is drawn",
        "training/data/augment.py",
        'drawn, side="right")',
        'drawn, side="left")',
        "unit/test_augment.py::test_probabilities_that_end_a_rounding_below_1_have_no_text_of_probability_0",
    ),
    Mutant(
        "all views of an image have the same crop",
        "training/data/augment.py",
        "settings.crop_area, settings.crop_aspect, view * NEXT_VIEW",
        "settings.crop_area, settings.crop_aspect, 0",
        "unit/test_loader.py::test_view_0_is_what_a_single_view_shows",
    ),
    Mutant(
        "the first view of several is not that of a run with one",
        "training/data/augment.py",
        "settings.crop_area, settings.crop_aspect, view * NEXT_VIEW",
        "settings.crop_area, settings.crop_aspect, (1 - view) * NEXT_VIEW",
        "unit/test_augment.py::test_views_have_draws_of_their_own",
    ),
    Mutant(
        "every view decodes the whole image again",
        "training/data/samples.py",
        "if scale not in decoded:",
        "if True:",
        "unit/test_loader.py::test_an_image_is_decoded_once_for_all_views",
    ),
    Mutant(
        "the gradient scaler starts anew",
        "training/checkpointing.py",
        'state.scaler.load_state_dict(facts["scaler"])',
        "pass",
        "faults/test_resume.py::test_every_stop_point",
    ),
    Mutant(
        "optimizer state is not restored",
        "training/optimizer_state.py",
        "optimizer.state[parameter][slot] = value",
        "_ = value",
        "faults/test_resume.py::test_every_stop_point",
    ),
    Mutant(
        "the data begin again at the resumed step",
        "training/main.py",
        "start=state.progress.samples_seen,",
        "start=0,",
        "faults/test_resume.py::test_every_stop_point",
    ),
    Mutant(
        "a run resumes with another learning rate",
        "training/checkpointing.py",
        "changes = compare_runs(state, facts)",
        "changes = []",
        "faults/test_resume.py::test_another_run_is_refused_unless_allowed",
    ),
    Mutant(
        "the old checkpoint goes before the new one is there",
        "rwkv_clip/checkpoint.py",
        "            os.rename(final, old)\n        else:",
        "            _discard(final)\n        else:",
        f"{CRASH}",
    ),
    Mutant(
        "files are not flushed",
        "rwkv_clip/checkpoint.py",
        "        os.fsync(handle)\n    finally:\n        os.close(handle)\n    return measured",
        "        pass\n    finally:\n        os.close(handle)\n    return measured",
        f"{STORAGE}::test_everything_is_flushed_before_it_is_relied_on",
    ),
    Mutant(
        "pruned without a look at what stays",
        "rwkv_clip/checkpoint.py",
        "if gone and any(_proven.get(path) == _fingerprint(path) or _is_intact(path) for path in spared):",
        "if gone:",
        "unit/test_checkpoint.py",
    ),
    Mutant(
        "hashes are not compared",
        "rwkv_clip/checkpoint.py",
        'good = good and hash_file(file) == entry.get("sha256")',
        "pass",
        f"{STORAGE}::test_bitflip",
    ),
    Mutant(
        "a checkpoint is written from the living tensors",
        "training/saver.py",
        "copies[key] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)",
        "copies[key] = tensor.detach()",
        f"{STORAGE}::test_what_is_written_is_the_moment_of_the_save",
    ),
    Mutant(
        "a step that is not finite reaches the weights",
        "training/faults/nonfinite.py",
        "        return torch.maximum(failed, overflow)\n",
        "        return torch.zeros_like(failed)\n",
        "faults/test_nonfinite.py::test_a_skipped_step_is_a_step_left_out",
    ),
    Mutant(
        "the count of bad steps is not resumed",
        "training/checkpointing.py",
        "    state.watch.load_state_dict(facts)\n",
        "",
        "faults/test_nonfinite.py::test_a_resumed_run_goes_on_counting",
    ),
    Mutant(
        "nothing is saved at a signal",
        "training/loop.py",
        "    if signal or stuck:\n        _save(trainer, run, last=True)\n",
        "    if signal or stuck:\n",
        "faults/test_signals.py::test_signals_at_random_times",
    ),
    Mutant(
        "a run folder has two owners",
        "rwkv_clip/files.py",
        "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "dist/test_failure.py::test_a_run_folder_has_one_owner",
    ),
    Mutant(
        "restarted ranks use the names of dead ones",
        "rwkv_clip/dist.py",
        "    token = secrets.token_hex(8)\n",
        '    return "constant"\n    token = secrets.token_hex(8)\n',
        "unit/test_dist.py",
    ),
    Mutant(
        "ALIP weighs by the means of the step before",
        "rwkv_clip/losses/alip.py",
        "            if self.training:\n"
        "                kept = self.gates.momentum\n"
        "                self.mean_similarity.mul_(kept).add_(means, alpha=1 - kept)\n"
        "            of_samples, of_pairs = self.weigh(similarities)\n",
        "            of_samples, of_pairs = self.weigh(similarities)\n"
        "            kept = self.gates.momentum\n"
        "            self.mean_similarity.mul_(kept).add_(means, alpha=1 - kept)\n",
        "parity/test_alip_formulas.py::test_three_steps",
    ),
    Mutant(
        "ALIP's means are those of the own rank",
        "rwkv_clip/losses/alip.py",
        "means = gather(similarities).mean(0)",
        "means = similarities.mean(0)",
        "dist/test_alip_ranks.py::test_ranks_are_one_process",
    ),
    Mutant(
        "ALIP's gate is closed at equality",
        "rwkv_clip/losses/alip.py",
        "torch.where(agreement < 1, of_pairs, 1.0)",
        "torch.where(agreement <= 1, of_pairs, 1.0)",
        "parity/test_alip_formulas.py::test_texts_that_agree_as_much_as_on_average",
    ),
    Mutant(
        "ALIP's momentum is the fraction of what is new",
        "rwkv_clip/losses/alip.py",
        "self.mean_similarity.mul_(kept).add_(means, alpha=1 - kept)",
        "self.mean_similarity.mul_(1 - kept).add_(means, alpha=kept)",
        "parity/test_alip_formulas.py::test_three_steps",
    ),
    Mutant(
        "ALIP's weights are differentiated",
        "rwkv_clip/losses/alip.py",
        "with torch.no_grad():  # the weights are constants",
        "with torch.enable_grad():",
        "parity/test_alip_formulas.py::test_three_steps",
    ),
    Mutant(
        "ALIP's means are brought up to date with every micro-batch",
        "training/gradients.py",
        "        features = {name: value.detach() for name, value in _join(list(outputs.values())).items()}\n",
        "        features = {name: value.detach() for name, value in _join(list(outputs.values())).items()}\n"
        "        for own in [self.micro_batches.rows(number) for number in numbers[1:]]:\n"
        "            self.objective(**{k: v[own] if v.dim() else v for k, v in features.items()})\n",
        "dist/test_alip_ranks.py::test_runs_agree",
    ),
    Mutant(
        "ALIP's means are not saved",
        "training/checkpointing.py",
        '    optim |= {f"{OBJECTIVE}{key}": value for key, value in state.objective.state_dict().items()}\n',
        "",
        "unit/test_alip.py::test_a_resumed_run_has_the_same_bits",
    ),
    Mutant(
        "ALIP's means keep what a skipped step did",
        "training/trainer.py",
        "statistics = Statistics(state.model, state.objective)",
        "statistics = Statistics(state.model)",
        "unit/test_alip.py::test_a_skipped_step_leaves_the_means",
    ),
    Mutant(
        "repeats stay negatives of the texts",
        "rwkv_clip/losses/pairs.py",
        "for row in keys:\n",
        "for row in keys[:1]:\n",
        f"{POSITIVES}::test_every_chunk_height_is_the_dense_formula",
    ),
    Mutant(
        "a pair that repeats another is no pair either",
        "rwkv_clip/losses/pairs.py",
        "    found.diagonal(first).fill_(False)\n",
        "",
        f"{POSITIVES}::test_without_repeats_the_bits_are_those_of_pairs",
    ),
    Mutant(
        "repeats are left out of the loss but not of its gradient",
        "rwkv_clip/losses/pairs.py",
        "for chunk, scaled, scores, work in score_chunks(image, texts, scale, first, keys):",
        "for chunk, scaled, scores, work in score_chunks(image, texts, scale, first, None):",
        f"{POSITIVES}::test_every_chunk_height_is_the_dense_formula",
    ),
    Mutant(
        "what is left out is minus infinity",
        "rwkv_clip/losses/pairs.py",
        "torch.finfo(scores.dtype).min)",
        'float("-inf"))',
        f"{POSITIVES}::test_every_chunk_height_is_the_dense_formula",
    ),
    Mutant(
        "a rank knows the keys of its own pairs only",
        "rwkv_clip/losses/pairs.py",
        "return list(gather(torch.stack(found, 1)).permute(2, 1, 0).contiguous())",
        "own = torch.stack(found, 1)\n"
        "    everybody = -1 - torch.arange(len(gather(own)))[:, None, None].repeat(1, *own.shape[1:])\n"
        "    first = rank_and_size()[0] * len(own)\n"
        "    everybody[first : first + len(own)] = own\n"
        "    return list(everybody.permute(2, 1, 0).contiguous())",
        "dist/test_positives_ranks.py::test_ranks_are_one_process",
    ),
    Mutant(
        "with --deterministic every rank has its own keys",
        "training/deterministic.py",
        "facts = {name: gather(value) for name, value in facts.items()}",
        "facts = {name: value.repeat(self.world.size, *[1] * (value.dim() - 1)) for name, value in facts.items()}",
        "dist/test_positives_ranks.py::test_deterministic_runs_have_the_same_bits",
    ),
    Mutant(
        "a text's key forgets the order of its tokens",
        "training/data/augment.py",
        "| np.arange(rows.shape[-1], dtype=np.uint64)",
        "| np.uint64(1)",
        f"{POSITIVES}::test_keys_of_texts",
    ),
    Mutant(
        "an image's key is that of its record",
        "training/data/samples.py",
        "key = hash_bytes(data) if self.keys else None",
        "key = index if self.keys else None",
        f"{POSITIVES}::test_keys_of_images_are_of_their_bytes",
    ),
    Mutant(
        "a policy draws what the module `random` gives next",
        "training/policy.py",
        "        random.seed(seed)\n",
        "",
        f"{POLICIES}::test_pixels_do_not_depend_on_workers_ranks_or_start",
    ),
    Mutant(
        "a policy leaves the generators as it used them",
        "training/policy.py",
        "            random.setstate(before[0])\n",
        "            pass\n",
        f"{POLICIES}::test_global_generators_stay_as_they_were_and_do_not_matter",
    ),
    Mutant(
        "all views of an image have the same policy",
        "training/data/augment.py",
        "hash64(seed, epoch, sample, POLICY + view * NEXT_VIEW)",
        "hash64(seed, epoch, sample, POLICY)",
        f"{POLICIES}::test_epochs_and_views_differ_and_view_0_is_a_run_with_one",
    ),
    Mutant(
        "the captions of an image stand together in the validation loss",
        "training/validation.py",
        'np.argsort(hash64(seed, np.arange(len(pairs))), kind="stable")',
        "np.arange(len(pairs))",
        "unit/test_batch_measures.py::test_validation_is_the_plain_formula_batch_by_batch",
    ),
]
