"""What a comparison of two models came to: as tables, as JSON, as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers_kt.evaluation.divergence import Distances, Estimate, Statistics
from transformers_kt.planning.tables import new_table, rendered

if TYPE_CHECKING:
    from rich.table import Table

_ALL = "all"
_MEANINGS = (
    "KL divergence, in nats: how far the probabilities of the next token are from the reference's; 0 is none. Same top "
    "token: how often both think the same token likeliest. Perplexity: the exponential of the mean negative log "
    "likelihood of a token; lower is better. Behind ± is one standard error, for which tokens count as independent."
)


@dataclass(frozen=True, slots=True)
class QualityReport:
    """``model`` and ``reference`` say what was compared, ``texts`` has the `Statistics` of each text by its name,
    ``overall`` those of all tokens together. ``distances`` are those of each token, by text.

    ``context`` is the length of the windows that texts were cut into, in tokens.
    """

    model: str
    reference: str
    context: int
    texts: Mapping[str, Statistics]
    overall: Statistics
    distances: Mapping[str, Distances] = field(repr=False)

    @classmethod
    def of(cls, model: str, reference: str, context: int, measured: Mapping[str, Distances]) -> QualityReport:
        texts = {name: Statistics.of(each) for name, each in measured.items()}
        overall = Statistics.of(Distances.joined(list(measured.values())))
        return cls(model, reference, context, texts, overall, measured)

    def to_dict(self) -> dict[str, Any]:
        """Plain values all through, fit for JSON. An estimate has ``value`` and ``error``."""
        return {
            "model": self.model,
            "reference": self.reference,
            "context": self.context,
            "overall": _plain(self.overall),
            "texts": {name: _plain(each) for name, each in self.texts.items()},
        }

    def __str__(self) -> str:
        heading = f"{self.model} against {self.reference}, {self.context:,} tokens of context"
        return rendered(heading, self._divergence_table(), self._perplexity_table(), _MEANINGS)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture: how large divergences are and how often, and their mean for each text."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.2), layout="constrained")
        often, means = figure.subplots(1, 2)
        names = list(self.texts)
        for measured in self.distances.values():
            kl = measured.kl.sort(descending=True).values.clamp_min(1e-12)
            often.step(kl, [100 * (rank + 1) / len(kl) for rank in range(len(kl))], linewidth=1)
        often.set(xscale="log", yscale="log", xlabel="KL divergence, nats", ylabel="tokens with more than that, %")
        often.set_xlim(left=self.overall.kl_median / 100)
        places = range(len(names))
        estimates = [self.texts[name].kl_mean for name in names]
        means.barh(places, [each.value for each in estimates], xerr=[each.error for each in estimates],
                   color=[f"C{place % 10}" for place in places])  # fmt: skip
        means.axvline(self.overall.kl_mean.value, color="black", linewidth=1, label="all texts")
        means.set_yticks(places, names)
        means.invert_yaxis()
        means.xaxis.set_major_formatter(lambda nats, _: f"{nats:.2g}")
        means.locator_params(axis="x", nbins=5)
        means.set(xlabel="mean KL divergence, nats (lower is better)", xlim=(0, None))
        figure.legend(loc="outside lower right", frameon=False)
        for axis in (often, means):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="x", alpha=0.3)
            axis.set_axisbelow(True)
        figure.suptitle(f"{self.model}\nagainst {self.reference}", fontsize=11)
        figure.savefig(path, dpi=100)

    def _rows(self) -> list[tuple[str, Statistics]]:
        return [*self.texts.items(), *([] if len(self.texts) == 1 else [(_ALL, self.overall)])]

    def _divergence_table(self) -> Table:
        columns = ("text", "tokens", "KL mean", "median", "99%", "same top token, %")
        table = new_table(*columns, numbers=columns[1:])
        table.show_footer = False
        for name, each in self._rows():
            share = Estimate(100 * each.same_top.value, 100 * each.same_top.error)
            kl = (_shown(each.kl_mean), f"{each.kl_median:.3g}", f"{each.kl_99:.3g}")
            table.add_row(name, f"{each.tokens:,}", *kl, _shown(share))
        return table

    def _perplexity_table(self) -> Table:
        columns = ("text", "perplexity", "of the reference", "ratio")
        table = new_table(*columns, numbers=columns[1:])
        table.show_footer = False
        for name, each in self._rows():
            table.add_row(name, *map(_shown, (each.perplexity, each.reference_perplexity, each.perplexity_ratio)))
        return table


def _plain(statistics: Statistics) -> dict[str, Any]:
    return {
        name: value._asdict() if isinstance(value, Estimate) else value
        for name in Statistics.__dataclass_fields__
        for value in (getattr(statistics, name),)
    }


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} ± {estimate.error:.2g}"
