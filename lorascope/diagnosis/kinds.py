"""Kinds of findings: stable id, name, severity, evidence and fix of everything that a diagnosis can report.

An id keeps its meaning, and the id of a removed kind is never used again. LS0xx are faults of adapters and trainings,
LS1xx observations, LS2xx treatments by a runtime, LS3xx mistakes of a merge, and LS4xx observations about neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "caution", "note"]


@dataclass(frozen=True)
class Kind:
    """Kind of finding.

    Parameters
    ----------
    id : str
        Stable id, such as "LS001".
    name : str
        Name of the cause; two kinds may share one.
    severity : {"error", "caution", "note"}
        Severity of a fault, and the usual one of an observation.
    needs : str
        Evidence that the check requires: factors, config, weights, base, history, training (checked only while it
        trains), merged model, or tuned model.
    problem : str
        What is wrong, as one sentence.
    evidence : str
        Numbers that show it, with the threshold.
    fix : str
        Suggested fix, empty for an observation. Findings of runtimes have one for the case at hand.
    """

    id: str
    name: str
    severity: Severity
    needs: str
    problem: str
    evidence: str
    fix: str = ""

    @property
    def number(self) -> int:
        """Id as a number, which is the value of the recorded quantity ``alarm``."""
        return int(self.id[2:])


_UNMATCHED = "compare with model.named_modules(): PEFT matches the end of a name, and ignores other keys"

_KINDS = (
    Kind(
        *("LS001", "nan", "error", "factors", "The update contains NaN or infinity."),
        "the norm of the update of a module is NaN or infinite",
        "train again with bf16 instead of fp16, a lower learning rate or clipping; this adapter cannot be repaired",
    ),
    Kind(
        *("LS002", "scale-zero", "error", "factors", "The scale is 0, so the adapter has no output and no gradient."),
        "the scale of a module is 0, for example because lora_alpha is 0",
        "set lora_alpha above 0 (r or 2 r are common), and train again",
    ),
    Kind(
        *("LS003", "untrained", "error", "config", "The adapter equals its initialization."),
        "B (E in AdaLoRA) is zero in all modules of a saved adapter",
        "save after training, and save the adapter that was trained (PEFT saves each adapter name separately)",
    ),
    Kind(
        *("LS004", "unused", "error", "history", "Training did not change any adapter."),
        "B is zero in all modules after the recorded steps, or no PEFT adapter was active",
        "train with the adapter enabled (set_adapter, no disable_adapter), on modules that the forward pass uses",
    ),
    Kind(
        *(
            "LS005",
            "dead",
            "error",
            "factors",
            "All factors are zero, so their gradients are zero as well.",
        ),
        "A and B of a module are both zero, and its scale is not",
        "initialize one factor randomly and the other with zeros, as PEFT does, and train again",
    ),
    Kind(
        *("LS006", "dead", "caution", "factors", "A layer changed far less than the others."),
        "the learned update of a layer is below 1e-3 of the median layer, and not zero",
        "check these layers for a separate learning rate, a mask, or a branch without gradient",
    ),
    Kind(
        *("LS007", "frozen", "caution", "factors", "Some adapters did not change while others did."),
        "the update is exactly zero in some modules but not in others (not checked for AdaLoRA, which may prune)",
        "make them trainable (requires_grad, groups of the optimizer), or remove them from the targets",
    ),
    Kind(
        *("LS008", "unmatched", "caution", "config", "An entry of target_modules names no module."),
        "it is the end of no module's name, so PEFT ignores it",
        _UNMATCHED,
    ),
    Kind(
        *("LS009", "unmatched", "caution", "config", "A key of rank_pattern or alpha_pattern names no module."),
        "the key matches the name of no adapted module, so PEFT ignores it",
        _UNMATCHED,
    ),
    Kind(
        *(
            "LS010",
            "overscaled",
            "caution",
            "weights",
            "The update outweighs the weights: its scale is too large.",
        ),
        "the update is larger than the weight, at a scale above 16",
        "set lora_alpha to r or 2 r: the scale is alpha / r (alpha / sqrt(r) for rsLoRA), not alpha",
    ),
    Kind(
        *(
            "LS011",
            "uneven-scale",
            "caution",
            "config",
            "Modules with their own rank have another scale.",
        ),
        "alpha_pattern misses modules of rank_pattern, whose scale differs from the others by a factor of 2 or more",
        "add the keys of rank_pattern to alpha_pattern, with alpha = scale x rank",
    ),
    Kind(
        *("LS012", "allocator-idle", "caution", "factors", "AdaLoRA never removed a component."),
        "all components are still in use at a step at which some should have been removed",
        "call model.base_model.update_and_allocate(step) between optimizer.step() and zero_grad()",
    ),
    Kind(
        *("LS013", "budget-missed", "caution", "factors", "AdaLoRA exceeds its budget: the schedule was cut short."),
        "more components are in use than the budget, by over 1% of those to remove",
        "set total_step to the number of steps in training, and tinit + tfinal well below it",
    ),
    Kind(
        *("LS014", "rate-small", "caution", "weights", "Training changed the weights, but hardly."),
        "the learned update of all modules together is below 1e-4 of the norm of their weights",
        "raise the learning rate by a factor of 10 or more (FourierFT needs far more than LoRA), or train longer",
    ),
    Kind(
        *("LS015", "diverged", "error", "history", "The loss increased far above its first value, or became NaN."),
        "the mean of the last fifth of the losses is at least 1 nat above the first one, or NaN",
        "lower the learning rate (by a factor of 10), warm up longer, or clip gradients",
    ),
    Kind(
        *("LS016", "collapsed", "caution", "factors", "The updates use a single direction of their rank."),
        "the effective rank is at most 1.01 in more than half of the modules that use at least four components",
        "initialize A randomly (equal rows get equal gradients and stay equal); otherwise rank 1 is enough",
    ),
    Kind(
        *("LS017", "tied-twice", "error", "base", "Two names of one weight each have an adapter."),
        "embedding and head share their weight, and both are adapted",
        "adapt only one of them, or untie them first (tie_word_embeddings=False) and save the base",
    ),
    Kind(
        *("LS018", "leak", "caution", "history", "Evaluation rows are also training rows."),
        "the fraction of the evaluation rows that training saw is above 0 (by object identity, for a Trainer)",
        "use separate rows for eval_dataset, such as the test rows of train_test_split",
    ),
    Kind(
        *("LS019", "rate-zero", "error", "training", "The learning rate is 0, so nothing trains."),
        "the learning rate of all parameter groups is 0 at each of the first three steps or more",
        "set a learning rate above 0, and step the scheduler after the optimizer",
    ),
    Kind(
        *("LS020", "rate-large", "caution", "training", "Training replaces the pretrained weights."),
        "the learned update of all modules together is more than 10 times the norm of their weights",
        "lower the learning rate (by a factor of 10), or the scale of the adapter",
    ),
    Kind(
        *("LS021", "no-gradient", "error", "training", "No gradient reaches the trained parameters."),
        "the gradients of all trained parameters are zero or missing, and no module has changed",
        "call backward on a loss that depends on them: no torch.no_grad, detach, or labels of which all are ignored; "
        "gradient checkpointing requires model.enable_input_require_grads()",
    ),
    Kind(
        *("LS022", "not-optimized", "error", "training", "Trainable adapters are not in the optimizer."),
        "an adapter has parameters with requires_grad, and the optimizer contains none of them",
        "create the optimizer after the adapter, with all parameters that require gradients",
    ),
    Kind(
        *("LS023", "loss-flat", "caution", "training", "The loss never changes."),
        "all recorded losses are equal up to 1e-6, at five recordings or more",
        "check that the batches differ, that the loss depends on the model, and that the optimizer steps",
    ),
    Kind(
        *("LS024", "dominated", "caution", "training", "One module has almost the whole update."),
        "one of at least four adapters has more than 99.9% of the squared norm (not checked for AdaLoRA)",
        "check this module for a separate learning rate, another scale, or inputs that are far larger",
    ),
    Kind(
        *("LS101", "special-norms", "caution", "factors", "Norms depend on the input, or are NaN."),
        "the update is evaluated at gate weights, or its norm is NaN (an error)",
    ),
    Kind(
        *("LS102", "zero-updates", "note", "factors", "Updates are zero, or components are unused."),
        "|dW| is 0, or a singular value within the rank is below 1e-6 of the largest",
    ),
    Kind(
        *("LS103", "base-weights", "caution", "base", "The update adds intruder dimensions, or rotates neurons."),
        "singular vectors among the 10 leading ones with a cosine below 0.5 to all of the base's; 1 - cos of neurons",
    ),
    Kind(
        *("LS104", "rank-use", "note", "factors", "A quarter of the rank would be enough for some modules."),
        "number of modules with 90% of their energy in a quarter of their rank",
    ),
    Kind(
        *("LS105", "experts", "note", "config", "Modules are experts that are stored in one tensor."),
        "number of experts per parameter",
    ),
    Kind(
        *("LS106", "incomplete-norms", "caution", "config", "|dW| is not exactly the norm of the update."),
        "alpha is not saved, DoRA was read without its base, or a note of the format",
    ),
    Kind(
        *("LS107", "other-weights", "note", "config", "Weights are saved next to the factors."),
        "number of parameters, and the distance from the base",
    ),
    Kind(
        *("LS201", "dropped", "caution", "config", "The runtime leaves out modules, usually without a warning."),
        "names that the runtime does not find in the base, or not in its format",
        "rename the tensors as the finding says, or load the adapter into the model that it was trained on",
    ),
    Kind(
        *("LS202", "missing", "caution", "base", "Targeted modules have no factors, so they stay at their start."),
        "modules of the base that the configuration targets and the file does not have",
        "save the whole adapter, or name fewer targets",
    ),
    Kind(
        *("LS203", "refused", "error", "config", "The runtime raises an error, so nothing is applied."),
        "an unsupported option or tensor, a rank above the limit, or a shape that does not fit the weight",
        "change the option that the finding names, or merge the adapter into the base",
    ),
    Kind(
        *("LS204", "applied-differently", "caution", "config", "The runtime applies another update than was trained."),
        "an option that the runtime does not read, such as use_rslora in llama.cpp",
        "store the adapter without the option, as the finding says",
    ),
    Kind(
        *("LS301", "merge-not-merged", "error", "merged model", "The adapter is not in the merged weight."),
        "the weight equals the weight of the base",
        "merge the adapter again, and check that it is active (PEFT: peft_config, set_adapter)",
    ),
    Kind(
        *("LS302", "merge-wrong-scale", "error", "merged model", "The weight has another multiple of the update."),
        "the multiple by least squares: 2 if it was merged twice, -1 if it was subtracted",
        "merge once, with the scale of the adapter's configuration",
    ),
    Kind(
        *(
            "LS303",
            "merge-rounded",
            "error",
            "merged model",
            "The weight was rounded to a smaller dtype.",
        ),
        "all entries are values of the smaller dtype",
        "merge in the dtype of the base",
    ),
    Kind(
        *(
            "LS304",
            "merge-experts-swapped",
            "error",
            "merged model",
            "Experts have each other's merged weights.",
        ),
        "the weight equals the merged weight of another expert",
        "keep the order of the experts when their weights are stacked",
    ),
    Kind(
        *(
            "LS305",
            "merge-another-module",
            "error",
            "merged model",
            "The weight contains another module's update.",
        ),
        "correlation above 0.9 of its change with that update",
        "map the modules by their names, and merge again",
    ),
    Kind(
        *("LS306", "merge-wrong-adapter", "error", "merged model", "The change of the weight is not the update."),
        "entries differ from base + update by more than the rounding, at any scale",
        "merge this adapter into this base",
    ),
    Kind(
        *(
            "LS307",
            "merge-other-weights",
            "error",
            "merged model",
            "A weight without an adapter was changed.",
        ),
        "entries that are not equal bit by bit",
        "merge into this base; these weights are not adapted",
    ),
    Kind(
        *("LS401", "neurons-unchanged", "caution", "tuned model", "The feed-forward modules of two models are equal."),
        "no neuron changed",
    ),
    Kind(
        *("LS402", "projections-unchanged", "note", "tuned model", "Projections have a zero update."),
        "number of projections in which no neuron changed",
    ),
    Kind(
        *("LS403", "neurons-still", "note", "tuned model", "Neurons in changed projections did not change."),
        "number of neurons whose weights are equal before and after; 16-bit weights lose small changes",
    ),
    Kind(
        *("LS404", "neurons-zero", "note", "tuned model", "Neurons have no direction, so 1 - cos is unknown."),
        "weights of the neuron are zero before or after",
    ),
    Kind(
        *("LS405", "neurons-short", "note", "tuned model", "The rotation of short neurons is not meaningful."),
        "norm of a changed neuron below 1e-8 before or after",
    ),
)

KINDS: dict[str, Kind] = {kind.id: kind for kind in _KINDS}
"""Kinds of findings by id."""
