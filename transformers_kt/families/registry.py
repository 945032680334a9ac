"""The families there are: the one place that lists them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from transformers_kt.errors import UnsupportedModelError
from transformers_kt.families.base import Dims, Family, MlaDims
from transformers_kt.families.deepseek import DEEPSEEK
from transformers_kt.gguf.facts import Facts

_families: list[Family] = [DEEPSEEK]


def families() -> tuple[Family, ...]:
    return tuple(_families)


def register(family: Family) -> None:
    """Add ``family`` to those that are known; one of the same name is replaced."""
    _families[:] = [known for known in _families if known.name != family.name] + [family]
    stock_classes.cache_clear()


def unregister(family: Family) -> None:
    _families.remove(family)
    stock_classes.cache_clear()


def family_of(config: Any) -> Family:
    """The family of a config, by its ``model_type``. Raises `UnsupportedModelError` where there is none."""
    return family_of_type(config.model_type, "the model")


def dims_of(config: Any) -> Dims:
    return family_of(config).dims(config)


def require_routable(config: Any) -> None:
    """Raises UnsupportedModelError where a config's router could choose no experts, with the numbers that it names."""
    make_router, experts = family_of(config).router, dims_of(config).experts
    if make_router is None or not experts:
        return
    router = make_router(config)
    groups_fit = router.groups > 0 and experts % router.groups == 0 and 0 < router.top_groups <= router.groups
    # Sigmoid routers score a group by its two best experts.
    groups_fit = groups_fit and not (router.sigmoid and router.groups > 1 and experts // router.groups < 2)
    reachable = experts // router.groups * router.top_groups if groups_fit else 0
    if not 0 < router.top_k <= reachable:
        raise UnsupportedModelError(
            f"the config routes each token to {router.top_k} experts (num_experts_per_tok) in {router.top_groups} "
            f"(topk_group) of {router.groups} groups (n_group) of {experts} experts; groups of equal size, two at "
            "least for a sigmoid router, and at least one expert, but no more than the chosen groups hold, are accepted"
        )


def mla_of(config: Any) -> MlaDims:
    """Raises AssertionError for a family without it, whose attention no operation stands for."""
    mla = family_of(config).mla
    assert mla is not None
    return mla(config)


def family_of_type(model_type: Any, where: str) -> Family:
    """The same by the ``model_type`` alone; ``where`` it was found, for the message."""
    found = next((family for family in _families if model_type in family.model_types), None)
    if found is None:
        known = [name for family in _families for name in _names(family)]
        accepted = " and ".join(filter(None, (", ".join(known[:-1]), known[-1])))
        raise UnsupportedModelError(f"{where}: the config's model_type is {model_type!r}; {accepted} are accepted")
    return found


def knows(facts: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is of a model of some family."""
    model_type = language_model(facts).get("model_type")
    return any(model_type in family.model_types for family in _families)


def language_model(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The content of a config.json as transformers' class of the language model reads it: its part of a larger model,
    under a ``model_type`` that transformers has. Any other content as it is."""
    for family in _families:
        key, model_type = family.language_parts.get(str(facts.get("model_type")), ("", ""))
        if isinstance(part := facts.get(key), Mapping):
            facts = {"model_type": model_type, **part}
    for family in _families:
        if (alias := family.aliases.get(str(facts.get("model_type")))) is not None:
            facts = {**facts, "model_type": alias}
    return facts


def _names(family: Family) -> tuple[str, ...]:
    return (*family.model_types, *family.aliases, *family.language_parts)


def family_in(facts: Facts) -> Family:
    """The family of a GGUF, by its architecture. Raises `UnsupportedModelError` that lists the architectures known."""
    architecture = facts.architecture if isinstance(facts.architecture, str) else None  # a file may hold anything
    found = next((family for family in _families if architecture in family.architectures), None)
    if found is None:
        known = [f"{name} ({family.about})" for family in _families for name in family.architectures]
        raise UnsupportedModelError(
            f"{facts.name}: general.architecture is {facts.architecture!r}; {', '.join(known)} "
            f"{'is' if len(known) == 1 else 'are'} accepted"
        )
    return found


def response_template(chat_template: Any) -> dict[str, Any] | None:
    """How to take thoughts and answer apart where this is the chat template of the tokenizer; None if not known.

    Of all families, for tokenizers are named apart from architectures.
    """
    if not isinstance(chat_template, str):
        return None
    known = (response for family in _families for response in family.responses)
    return next((dict(r.template) for r in known if all(marker in chat_template for marker in r.markers)), None)


def read_by_others() -> frozenset[str]:
    """`Family.read_by_others` of all families."""
    return frozenset(name for family in _families for name in family.read_by_others)


@functools.cache  # asked for every module of a model
def stock_classes(kind: str) -> tuple[str, ...]:
    """The dotted names of the classes of ``kind`` in all families, as `Family.stock_classes` has them."""
    return tuple(name for family in _families for name in family.stock_classes.get(kind, ()))
