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
        Evidence that the check requires: factors, config, weights, base, history, training (checked only
        during training), merged model, or tuned model.
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
        id="LS001",
        name="nan",
        severity="error",
        needs="factors",
        problem="The update contains NaN or infinity.",
        evidence="the norm of the update of a module is NaN or infinite",
        fix="train again with bf16 instead of fp16, a lower learning rate or clipping; this adapter cannot be repaired",
    ),
    Kind(
        id="LS002",
        name="scale-zero",
        severity="error",
        needs="factors",
        problem="The scale is 0, so the adapter has no output and no gradient.",
        evidence="the scale of a module is 0, for example because lora_alpha is 0",
        fix="set lora_alpha above 0 (r or 2 r are common), and train again",
    ),
    Kind(
        id="LS003",
        name="untrained",
        severity="error",
        needs="config",
        problem="The adapter equals its initialization.",
        evidence="B (E in AdaLoRA) is zero in all modules of a saved adapter",
        fix="save after training, and save the adapter that was trained (PEFT saves each adapter name separately)",
    ),
    Kind(
        id="LS004",
        name="unused",
        severity="error",
        needs="history",
        problem="Training did not change any adapter.",
        evidence="B is zero in all modules after the recorded steps, or no PEFT adapter was active",
        fix="train with the adapter enabled (set_adapter, no disable_adapter), on modules that the forward pass uses",
    ),
    Kind(
        id="LS005",
        name="dead",
        severity="error",
        needs="factors",
        problem="All factors are zero, so their gradients are zero as well.",
        evidence="A and B of a module are both zero, and its scale is not",
        fix="initialize one factor randomly and the other with zeros, as PEFT does, and train again",
    ),
    Kind(
        id="LS006",
        name="dead",
        severity="caution",
        needs="factors",
        problem="A layer changed far less than the others.",
        evidence="the learned update of a layer is below 1e-3 of the median layer, and not zero",
        fix="check these layers for a separate learning rate, a mask, or a branch without gradient",
    ),
    Kind(
        id="LS007",
        name="frozen",
        severity="caution",
        needs="factors",
        problem="Some adapters did not change while others did.",
        evidence="the update is exactly zero in some modules but not in others (not checked for AdaLoRA, "
        "which may prune)",
        fix="make them trainable (requires_grad, groups of the optimizer), or remove them from the targets",
    ),
    Kind(
        id="LS008",
        name="unmatched",
        severity="caution",
        needs="config",
        problem="An entry of target_modules names no module.",
        evidence="no module name ends with it, so PEFT ignores it",
        fix=_UNMATCHED,
    ),
    Kind(
        id="LS009",
        name="unmatched",
        severity="caution",
        needs="config",
        problem="A key of rank_pattern or alpha_pattern names no module.",
        evidence="the key matches the name of no adapted module, so PEFT ignores it",
        fix=_UNMATCHED,
    ),
    Kind(
        id="LS010",
        name="overscaled",
        severity="caution",
        needs="weights",
        problem="The update outweighs the weights: its scale is too large.",
        evidence="the update is larger than the weight, at a scale above 16",
        fix="set lora_alpha to r or 2 r: the scale is alpha / r (alpha / sqrt(r) for rsLoRA), not alpha",
    ),
    Kind(
        id="LS011",
        name="uneven-scale",
        severity="caution",
        needs="config",
        problem="Modules with their own rank have another scale.",
        evidence="modules of rank_pattern have no entry in alpha_pattern, and their scale differs from the others "
        "by a factor of 2 or more",
        fix="add the keys of rank_pattern to alpha_pattern, with alpha = scale x rank",
    ),
    Kind(
        id="LS012",
        name="allocator-idle",
        severity="caution",
        needs="factors",
        problem="AdaLoRA never removed a component.",
        evidence="all components are still in use at a step at which some should have been removed",
        fix="call model.base_model.update_and_allocate(step) between optimizer.step() and zero_grad()",
    ),
    Kind(
        id="LS013",
        name="budget-missed",
        severity="caution",
        needs="factors",
        problem="AdaLoRA exceeds its budget: the schedule was cut short.",
        evidence="more components are in use than the budget, by over 1% of those to remove",
        fix="set total_step to the number of steps in training, and tinit + tfinal well below it",
    ),
    Kind(
        id="LS014",
        name="rate-small",
        severity="caution",
        needs="weights",
        problem="Training changed the weights, but hardly.",
        evidence="the learned update of all modules together is below 1e-4 of the norm of their weights",
        fix="raise the learning rate by a factor of 10 or more (FourierFT needs far more than LoRA), or train longer",
    ),
    Kind(
        id="LS015",
        name="diverged",
        severity="error",
        needs="history",
        problem="The loss increased far above its first value, or became NaN.",
        evidence="the median of the last losses exceeds the first loss by 1 nat, by half of it, and by 3 usual "
        "differences of losses or 10 times the first loss; or it is NaN",
        fix="lower the learning rate (by a factor of 10), warm up longer, or clip gradients",
    ),
    Kind(
        id="LS016",
        name="collapsed",
        severity="caution",
        needs="factors",
        problem="The updates use a single direction of their rank.",
        evidence="the effective rank is at most 1.01 in more than half of the modules that use at least "
        "four components",
        fix="initialize A randomly (equal rows get equal gradients and stay equal); otherwise rank 1 is enough",
    ),
    Kind(
        id="LS017",
        name="tied-twice",
        severity="error",
        needs="base",
        problem="Two names of one weight each have an adapter.",
        evidence="embedding and head share their weight, and both are adapted",
        fix="adapt only one of them, or untie them first (tie_word_embeddings=False) and save the base",
    ),
    Kind(
        id="LS018",
        name="leak",
        severity="caution",
        needs="history",
        problem="Evaluation rows are also training rows.",
        evidence="the fraction of the evaluation rows that training saw is above 0 (by object identity, for a Trainer)",
        fix="use separate rows for eval_dataset, such as the test rows of train_test_split",
    ),
    Kind(
        id="LS019",
        name="rate-zero",
        severity="error",
        needs="training",
        problem="The learning rate is 0, so nothing trains.",
        evidence="the learning rate of all parameter groups is 0 at each of the first three steps or more",
        fix="set a learning rate above 0, and step the scheduler after the optimizer",
    ),
    Kind(
        id="LS020",
        name="rate-large",
        severity="caution",
        needs="training",
        problem="Training replaces the pretrained weights.",
        evidence="the learned update of all modules together is more than 10 times the norm of their weights",
        fix="lower the learning rate (by a factor of 10), or the scale of the adapter",
    ),
    Kind(
        id="LS021",
        name="no-gradient",
        severity="error",
        needs="training",
        problem="No gradient reaches the trained parameters.",
        evidence="the gradients of all trained parameters are zero or missing, and no module has changed",
        fix="call backward on a loss that depends on them: no torch.no_grad, detach, or labels of "
        "which all are ignored; "
        "gradient checkpointing requires model.enable_input_require_grads()",
    ),
    Kind(
        id="LS022",
        name="not-optimized",
        severity="error",
        needs="training",
        problem="Trainable adapters are not in the optimizer.",
        evidence="an adapter has parameters with requires_grad, and the optimizer contains none of them",
        fix="create the optimizer after the adapter, with all parameters that require gradients",
    ),
    Kind(
        id="LS023",
        name="loss-flat",
        severity="caution",
        needs="training",
        problem="The loss never changes.",
        evidence="all recorded losses are equal up to 1e-6, at five recordings or more, and not 0 while weights change",
        fix="check that the batches differ, that the loss depends on the model, and that the optimizer steps",
    ),
    Kind(
        id="LS024",
        name="dominated",
        severity="caution",
        needs="training",
        problem="One module has almost the whole update.",
        evidence="one of at least four adapters has more than 99.9% of the squared norm (not checked for AdaLoRA)",
        fix="check this module for a separate learning rate, another scale, or inputs that are far larger",
    ),
    Kind(
        id="LS101",
        name="special-norms",
        severity="caution",
        needs="factors",
        problem="Norms depend on the input, or are NaN.",
        evidence="the update is evaluated at gate weights, or its norm is NaN (an error)",
    ),
    Kind(
        id="LS102",
        name="zero-updates",
        severity="note",
        needs="factors",
        problem="Updates are zero, or components are unused.",
        evidence="|dW| is 0, or a singular value within the rank is below 1e-6 of the largest",
    ),
    Kind(
        id="LS103",
        name="base-weights",
        severity="caution",
        needs="base",
        problem="The update adds intruder dimensions, or rotates neurons.",
        evidence="singular vectors among the 10 leading ones with a cosine below 0.5 to all of the base's; "
        "1 - cos of neurons",
    ),
    Kind(
        id="LS104",
        name="rank-use",
        severity="note",
        needs="factors",
        problem="Some modules have 90% of their energy in a quarter of their rank.",
        evidence="their number",
    ),
    Kind(
        id="LS105",
        name="experts",
        severity="note",
        needs="config",
        problem="Modules are experts that are stored in one tensor.",
        evidence="number of experts per parameter",
    ),
    Kind(
        id="LS106",
        name="incomplete-norms",
        severity="caution",
        needs="config",
        problem="|dW| is not exactly the norm of the update.",
        evidence="alpha is not saved, DoRA was read without its base, or a note of the format",
    ),
    Kind(
        id="LS107",
        name="other-weights",
        severity="note",
        needs="config",
        problem="Weights are saved next to the factors.",
        evidence="number of parameters, and the distance from the base",
    ),
    Kind(
        id="LS201",
        name="dropped",
        severity="caution",
        needs="config",
        problem="The runtime leaves out modules, usually without a warning.",
        evidence="names that the runtime does not find in the base, or not in its format",
        fix="rename the tensors as the finding says, or load the adapter into the model that it was trained on",
    ),
    Kind(
        id="LS202",
        name="missing",
        severity="caution",
        needs="base",
        problem="Targeted modules have no factors, so their base weights are used unchanged.",
        evidence="modules of the base that the configuration targets and the file does not have",
        fix="save the whole adapter, or name fewer targets",
    ),
    Kind(
        id="LS203",
        name="refused",
        severity="error",
        needs="config",
        problem="The runtime raises an error, so nothing is applied.",
        evidence="an unsupported option or tensor, a rank above the limit, or a shape that does not fit the weight",
        fix="change the option that the finding names, or merge the adapter into the base",
    ),
    Kind(
        id="LS204",
        name="applied-differently",
        severity="caution",
        needs="config",
        problem="The runtime applies another update than was trained.",
        evidence="an option that the runtime does not read, such as use_rslora in llama.cpp",
        fix="store the adapter without the option, as the finding says",
    ),
    Kind(
        id="LS301",
        name="merge-not-merged",
        severity="error",
        needs="merged model",
        problem="The adapter is not in the merged weight.",
        evidence="the weight equals the weight of the base",
        fix="merge the adapter again, and check that it is active (PEFT: peft_config, set_adapter)",
    ),
    Kind(
        id="LS302",
        name="merge-wrong-scale",
        severity="error",
        needs="merged model",
        problem="The weight has another multiple of the update.",
        evidence="the multiple by least squares: 2 if it was merged twice, -1 if it was subtracted",
        fix="merge once, with the scale of the adapter's configuration",
    ),
    Kind(
        id="LS303",
        name="merge-rounded",
        severity="error",
        needs="merged model",
        problem="The weight was rounded to a smaller dtype.",
        evidence="all entries are values of the smaller dtype",
        fix="merge in the dtype of the base",
    ),
    Kind(
        id="LS304",
        name="merge-experts-swapped",
        severity="error",
        needs="merged model",
        problem="Experts have each other's merged weights.",
        evidence="the weight equals the merged weight of another expert",
        fix="keep the order of the experts when their weights are stacked",
    ),
    Kind(
        id="LS305",
        name="merge-another-module",
        severity="error",
        needs="merged model",
        problem="The weight contains another module's update.",
        evidence="correlation above 0.9 of its change with that update",
        fix="map the modules by their names, and merge again",
    ),
    Kind(
        id="LS306",
        name="merge-wrong-adapter",
        severity="error",
        needs="merged model",
        problem="The change of the weight is not the update.",
        evidence="entries differ from base + update by more than the rounding, at any scale",
        fix="merge this adapter into this base",
    ),
    Kind(
        id="LS307",
        name="merge-other-weights",
        severity="error",
        needs="merged model",
        problem="A weight without an adapter was changed.",
        evidence="entries that are not equal bit by bit",
        fix="merge into this base; these weights are not adapted",
    ),
    Kind(
        id="LS401",
        name="neurons-unchanged",
        severity="caution",
        needs="tuned model",
        problem="The feed-forward modules of two models are equal.",
        evidence="no neuron changed",
    ),
    Kind(
        id="LS402",
        name="projections-unchanged",
        severity="note",
        needs="tuned model",
        problem="Projections have a zero update.",
        evidence="number of projections in which no neuron changed",
    ),
    Kind(
        id="LS403",
        name="neurons-still",
        severity="note",
        needs="tuned model",
        problem="Neurons in changed projections did not change.",
        evidence="number of neurons whose weights are equal before and after; 16-bit weights lose small changes",
    ),
    Kind(
        id="LS404",
        name="neurons-zero",
        severity="note",
        needs="tuned model",
        problem="Neurons have no direction, so 1 - cos is unknown.",
        evidence="weights of the neuron are zero before or after",
    ),
    Kind(
        id="LS405",
        name="neurons-short",
        severity="note",
        needs="tuned model",
        problem="The rotation of short neurons is not meaningful.",
        evidence="norm of a changed neuron below 1e-8 before or after",
    ),
)

KINDS: dict[str, Kind] = {kind.id: kind for kind in _KINDS}
"""Kinds of findings by id."""
