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
CRASH, STORAGE = "faults/test_crash_points.py", "faults/test_storage.py"
TRAINING = [
    Mutant(
        "gradients by all-reduce, in its own order",
        "training/treesum.py",
        "    for bucket in _buckets(tensors):  #",
        "    for tensor in tensors:\n        dist.all_reduce(tensor)\n    for bucket in _buckets([]):  #",
        f"{ELASTIC}::test_same_bits",
    ),
    Mutant(
        "pieces added one after the other instead of as a tree",
        "training/treesum.py",
        "while sums and sums[-1][0] == level:",
        "if sums:\n            level = sums[-1][0] - 1\n        while sums:",
        f"{ELASTIC}::test_same_bits",
    ),
    Mutant(
        "stochastic depth drawn from a generator",
        "training/step.py",
        "if inputs.drop_numbers is not None:",
        "if False:",
        f"{ELASTIC}::test_the_mode_matters",
    ),
    Mutant(
        "each rank has an order of its own",
        "training/data.py",
        "begin = self.first(step) + self.rank * self.local_batch",
        "begin = self.first(step) // self.world + self.rank * 10**6",
        f"{ELASTIC}::test_the_mode_matters",
    ),
    Mutant(
        "the second pass draws other dropout",
        "training/step.py",
        "torch.manual_seed(int(hash64(self.seed, step, self.pieces.first + piece)[0] >> 1))",
        "pass",
        "unit/test_step.py::test_the_second_pass_repeats_dropout_and_drop_path",
    ),
    Mutant(
        "negatives of the own piece only",
        "training/step.py",
        "losses, report, *d_features, d_scale = self._compare(image, text, scale, scale_loss)",
        "rows = [self.pieces.rows(piece) for piece in pieces]\n"
        "        parts = [self._compare(image[own], text[own], scale, scale_loss) for own in rows]\n"
        "        losses, report, d_scale = *parts[0][:2], sum(part[4] for part in parts) / len(parts)\n"
        "        d_features = [torch.cat([part[i] for part in parts]) / len(parts) for i in (2, 3)]",
        "unit/test_step.py::test_accumulation_in_float64",
    ),
    Mutant(
        "the temperature's gradient once per piece",
        "training/step.py",
        "torch.autograd.backward(output[:2], gradients)",
        "torch.autograd.backward(output, [*gradients, d_scale])",
        "unit/test_step.py::test_accumulation_in_float64",
    ),
    Mutant(
        "ranks exchange gradients after every piece",
        "training/parallel.py",
        "waits = isinstance(parallel, DistributedDataParallel) and not last",
        "waits = False",
        "unit/test_step.py::test_two_ranks_with_accumulation",
    ),
    Mutant(
        "text choice from the global generator",
        "training/augment.py",
        "return np.minimum((uniforms(seed, epochs, ids, VIEW) * views).astype(np.int64), views - 1)",
        "return np.random.randint(0, views, len(ids))",
        "faults/test_resume.py::test_every_stop_point",
    ),
    Mutant(
        "the gradient scaler starts anew",
        "training/snapshot.py",
        'trainer.scaler.load_state_dict(state["scaler"])',
        "pass",
        "faults/test_resume.py::test_every_stop_point",
    ),
    Mutant(
        "optimizer state is not restored",
        "training/optim.py",
        "optimizer.state[parameter][slot] = ",
        "_ = ",
        "faults/test_resume.py::test_every_stop_point",
    ),
    Mutant(
        "the data begin again at the resumed step",
        "training/main.py",
        "start=trainer.progress.samples_seen,",
        "start=0,",
        "faults/test_resume.py::test_every_stop_point",
    ),
    Mutant(
        "a run resumes with another learning rate",
        "training/snapshot.py",
        "changes = compare_runs(trainer, state)",
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
        "training/numerics.py",
        "        return torch.maximum(failed, overflow)\n",
        "        return torch.zeros_like(failed)\n",
        "faults/test_nonfinite.py::test_a_skipped_step_is_a_step_left_out",
    ),
    Mutant(
        "the count of bad steps is not resumed",
        "training/snapshot.py",
        "    trainer.watch.load_state_dict(state)\n",
        "",
        "faults/test_nonfinite.py::test_a_resumed_run_goes_on_counting",
    ),
    Mutant(
        "nothing is saved at a signal",
        "training/loop.py",
        "            trainer.save(saver, name, last=True)\n",
        "            pass\n",
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
        "rwkv_clip/objective.py",
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
        "rwkv_clip/objective.py",
        "means = gather(similarities).mean(0)",
        "means = similarities.mean(0)",
        "dist/test_alip_ranks.py::test_ranks_are_one_process",
    ),
    Mutant(
        "ALIP's gate is closed at equality",
        "rwkv_clip/objective.py",
        "torch.where(agreement < 1, of_pairs, 1.0)",
        "torch.where(agreement <= 1, of_pairs, 1.0)",
        "parity/test_alip_formulas.py::test_texts_that_agree_as_much_as_on_average",
    ),
    Mutant(
        "ALIP's momentum is the share of what is new",
        "rwkv_clip/objective.py",
        "self.mean_similarity.mul_(kept).add_(means, alpha=1 - kept)",
        "self.mean_similarity.mul_(1 - kept).add_(means, alpha=kept)",
        "parity/test_alip_formulas.py::test_three_steps",
    ),
    Mutant(
        "ALIP's weights are differentiated",
        "rwkv_clip/objective.py",
        "with torch.no_grad():  # the weights are constants",
        "with torch.enable_grad():",
        "parity/test_alip_formulas.py::test_three_steps",
    ),
    Mutant(
        "ALIP's means are brought up to date with every piece",
        "training/step.py",
        "        image, text, scale = (part.detach() for part in _join(outputs))\n",
        "        image, text, scale = (part.detach() for part in _join(outputs))\n"
        "        for own in [self.pieces.rows(piece) for piece in pieces[1:]]:\n"
        "            self.objective(image[own], text[own], scale)\n",
        "dist/test_alip_ranks.py::test_runs_agree",
    ),
    Mutant(
        "ALIP's means are not saved",
        "training/snapshot.py",
        'return optim | {f"{OBJECTIVE}{key}": value for key, value in trainer.objective.state_dict().items()}',
        "return optim",
        "unit/test_alip.py::test_a_resumed_run_has_the_same_bits",
    ),
    Mutant(
        "ALIP's means keep what a skipped step did",
        "training/loop.py",
        "statistics = Statistics(self.model, self.objective)",
        "statistics = Statistics(self.model)",
        "unit/test_alip.py::test_a_skipped_step_leaves_the_means",
    ),
]
