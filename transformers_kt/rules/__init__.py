r"""Placement rules: which operation computes which module, and where. Pure: nothing is loaded, imported or changed.

A rule is a mapping of three keys, a file a list of rules (`rules_files` has includes and variables)::

    match:                        # at least one; all that are given must fit
      name: \.mlp\.experts$       # regex, searched in the module's path
      class: torch.nn.Linear      # dotted name; subclasses match
      layers: 30-60               # 3, "3,7-9", "30-" (to the last), or a list of such
    replace:                      # at least one
      op: experts                 # a kind, auto (the default), or torch; experts_cpu names the device too
      device: cuda:1              # cpu (the default), cuda, cuda:1; "cuda*4" splits the layers over four
    recursive: true               # false: no other rule looks inside what this one matches

The kinds are attention, moe, mlp, experts, linear, embedding, norm and rotary.

**Which rule decides.** A rule with ``auto`` or an op holds for what it matches and for all inside; where several rules
hold for a module, the first in the list decides. ``torch`` (or ``default``) keeps the matched module as transformers
has it, with dequantized weights; inside it the other rules decide, and what none of them matches is kept too, as is a
module that no rule matches.

**What computes it.** ``auto`` takes the coarsest operation: an attention, an MLP or a block of experts becomes one, if
everything in it lies on one device and no rule named an op for a part; otherwise its parts become operations of their
own. A named op always replaces the module whole.

**KTransformers' language.** A rule whose ``replace`` has ``class`` or ``kwargs`` is read as KTransformers reads it
(`ktransformers` has the names): it holds for the matched modules only, unless ``recursive: false``; what no rule
matches is on cuda:0; a rule with nothing to do is a note of the plan, where in our form it is an error. Their ops
choose no kernel: each module gets our operation for its device. Rules of both forms may stand in one file; one of
theirs puts what no rule matches on cuda:0.

A device map overrides the devices of rules: ``{"": "cpu"}`` moves everything to the CPU.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from transformers_kt.errors import RuleError
from transformers_kt.families.tree import ModelTree
from transformers_kt.rules.files import AUTO, KtRules, bundled_rules, load_items
from transformers_kt.rules.matching import root_site
from transformers_kt.rules.planner import DeviceMap, Operations, Plan, PlanEntry, Planner, RuleList
from transformers_kt.rules.syntax import TORCH, everything_auto, validated_rule

__all__ = [
    "AUTO",
    "TORCH",
    "DeviceMap",
    "KtRules",
    "Operations",
    "Plan",
    "PlanEntry",
    "RuleList",
    "bundled_rules",
    "load_rules",
    "make_plan",
]

_MOST_RULES = 10_000


def load_rules(kt_rules: KtRules, operations: Collection[str], variables: Mapping[str, int] | None = None) -> RuleList:
    """Validated rules from the value of ``kt_rules``.

    That is "auto"; a YAML path or bundled name, with variables behind it or not ("my-rules?gpus=4"); or what such a
    file would hold, as a list or mapping. ``operations`` are the kinds that rules may name. ``variables`` override
    those in the name.

    Raises `RuleError`, naming file, rule number and line, if the file is not there or anything in it is not understood.
    """
    if isinstance(kt_rules, str) and kt_rules == AUTO and not variables:
        return RuleList((everything_auto(),), AUTO)
    items, source = load_items(kt_rules, variables)
    if len(items) > _MOST_RULES:
        raise RuleError(f"{source} holds {len(items)} rules; up to {_MOST_RULES} are accepted")
    return RuleList(
        tuple(validated_rule(item, number, operations) for number, item in enumerate(items, start=1)), source
    )


def make_plan(
    tree: ModelTree,
    rule_list: RuleList,
    operations: Operations,
    not_by_itself: Collection[str] = (),
    *,
    kept: Collection[str] = (),
    device_map: DeviceMap | None = None,
) -> Plan:
    """What computes each module of the model under ``rule_list``, and where.

    ``operations`` are kinds. ``auto`` chooses none of those ``not_by_itself``; a rule of our form that names one of
    them still gets it. So it is with modules whose last name is one of ``kept``. Devices in ``device_map`` override
    those of rules.

    Raises `RuleError` if a rule of our form decides about no module, gives a module to an operation made for other
    classes, or to one operation what the device map divides.
    """
    return Planner(root_site(tree), rule_list, operations, not_by_itself, kept, device_map or {}).plan()
