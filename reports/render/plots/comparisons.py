"""Comparisons of methods: differences to a reference, ranks in each setting, mean ranks, heads, dev against test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import pandas as pd
import scikit_posthocs
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from scipy import stats

from reports.analysis.paired import BETTER, WORSE
from reports.analysis.statistics import SETTINGS, kendall_tau
from reports.read.frames import FACETS, rows_of
from reports.render.plots.context import (
    BARS,
    PANELS,
    PERCENT,
    Plot,
    PlotContext,
    add_legend,
    label_width,
    legend_height,
    new_figure,
    numbered,
    panels,
    shortened,
    slug,
)
from reports.render.style import HUES, MUTED, PAPER, SeriesStyle


def differences(context: PlotContext, significance: pd.DataFrame) -> Iterator[Plot]:
    """Forest plots of each method's difference to a reference, with the verdict in words."""
    for reference, rows in significance[significance.setting.isin(list(context.titles))].groupby("reference"):
        titles = {setting: title for setting, title in context.titles.items() if setting in set(rows.setting)}
        height = 0.8 + 0.2 * rows.groupby("setting").size().max()
        left = label_width(shortened(label, 24) for label in rows.label)
        for number, figure, panel in panels(titles, height, 2.3 + left + 1.3, left, right=1.3):
            for setting, axes in panel.items():
                _differences_panel(axes, rows[rows.setting == setting].sort_values("difference"), context.styles)
            figure.supxlabel(f"difference in mIoU to {shortened(reference)}, points", fontsize=8, color=MUTED)
            yield Plot(
                numbered(f"difference-to-{slug(reference)}", number, titles),
                "statistics",
                f"Difference to {shortened(reference)}",
                "Mean difference at equal seeds, with its 95 % interval over seeds and groups of images. Filled: "
                "better or worse after Holm's correction. Hollow: no significant difference, or no verdict.",
                figure,
            )


def _differences_panel(axes: Axes, rows: pd.DataFrame, styles: Mapping[str, SeriesStyle]) -> None:
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for height, row in enumerate(rows_of(rows)):
        style = styles[row.label]
        significant = row.verdict in (BETTER, WORSE)
        axes.plot([row.low, row.high], [height, height], color=style.colour, linewidth=1.1, solid_capstyle="butt")
        face = style.colour if significant else PAPER
        axes.plot(row.difference, height, style.marker, markersize=5 * style.size, color=style.colour, mfc=face)
        axes.annotate(
            row.verdict, (1, height), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=6.5,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [shortened(label, 24) for label in rows.label])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(PERCENT)


def _complete_scores(context: PlotContext) -> pd.DataFrame:
    """mIoU: settings × the labels with a score in each of them."""
    scores = context.averages.pivot(index="setting", columns="label", values="miou").dropna(axis="columns")
    return scores.reindex(list(context.titles))


def rank_stability(context: PlotContext) -> Iterator[Plot]:
    """Each method's rank from setting to setting, and Kendall's τ between any two settings."""
    scores = _complete_scores(context)
    if scores.shape[0] < 2 or scores.shape[1] < 3:
        return
    ranks = scores.rank(axis="columns", ascending=False)
    names = [context.titles[setting] for setting in ranks.index]
    size = max(2.6, 0.24 * ranks.shape[1] + 0.8)
    figure = new_figure(10.2, size + 1.0)
    paths, agreement = figure.subplots(1, 2, width_ratios=[1.6, 1])
    for label, line in ranks.items():
        style = context.styles[label]
        paths.plot(
            range(len(line)),
            line,
            color=style.colour,
            marker=style.marker,
            linestyle=style.line,
            markersize=5 * style.size,
        )
        paths.annotate(
            shortened(label, 24), (len(line) - 1, line.iloc[-1]), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=7, color=style.colour,
        )  # fmt: skip
    paths.set(title="Rank in each setting", ylim=(ranks.shape[1] + 0.5, 0.5), ylabel="rank by mean mIoU")
    paths.yaxis.set_major_locator(MaxNLocator(integer=True))
    agreement.set_title("Kendall's τ between settings")
    agreement.set(xlim=(-0.5, len(ranks) - 0.5), ylim=(len(ranks) - 0.5, -0.5), aspect="equal")
    agreement.grid(visible=False)
    for i, j in itertools.product(range(len(ranks)), repeat=2):
        tau = kendall_tau(ranks.iloc[i], ranks.iloc[j]) if i != j else 1.0
        colour = HUES[0] if tau >= 0 else HUES[1]
        agreement.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, color=colour, alpha=0.75 * abs(tau), linewidth=0))
        if len(ranks) <= PANELS:
            agreement.text(j, i, f"{tau:.2f}", ha="center", va="center", fontsize=7)
    for axes in (paths, agreement):
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor", fontsize=6.5)
    agreement.set_yticks(range(len(names)), names, fontsize=6.5)
    left_out = context.averages.label.nunique() - ranks.shape[1]
    yield Plot(
        "rank-stability",
        "statistics",
        "Rank stability",
        f"Ranks of the mean mIoU over {context.seeds()}, among the {ranks.shape[1]} methods with a score in every "
        f"setting{f' ({left_out} others have gaps)' if left_out else ''}. τ is 1 for the same order in both settings, "
        "0 for unrelated orders, −1 for the reverse order.",
        figure,
    )


def critical_difference(context: PlotContext) -> Iterator[Plot]:
    """Demšar's diagram (JMLR 7, 2006): mean ranks over settings, joined where Nemenyi's test finds no difference."""
    scores = _complete_scores(context)
    if scores.shape[0] < SETTINGS or scores.shape[1] < 3:
        return
    numbers = range(scores.shape[1])  # in place of names: the library iterates over sets of them
    ranks = pd.Series(scores.rank(axis="columns", ascending=False).mean().to_numpy(), index=numbers)
    tested = scikit_posthocs.posthoc_nemenyi_friedman(scores.to_numpy())
    friedman = stats.friedmanchisquare(*scores.to_numpy().T)
    figure = new_figure(8.4, 0.9 + 0.17 * scores.shape[1])
    axes = figure.subplots()
    series = [context.styles[label] for label in scores.columns]
    drawn = scikit_posthocs.critical_difference_diagram(
        ranks, tested, ax=axes, label_fmt_left="{label}", label_fmt_right="{label}",
        color_palette=dict(enumerate(style.colour for style in series)),
        crossbar_props={"color": MUTED, "linewidth": 2.2}, label_props={"fontsize": 7.5}, marker_props={"s": 16},
        text_h_margin=0.12,
    )  # fmt: skip
    for text in drawn["labels"]:
        number = int(text.get_text())
        text.set_text(f" {shortened(scores.columns[number], 24)}  {ranks[number]:.2f} ")
    axes.grid(visible=False)
    yield Plot(
        "critical-difference",
        "statistics",
        "Mean rank over all settings",
        f"Mean rank over {scores.shape[0]} settings, 1 is best. Methods under one bar: no significant difference "
        f"(Nemenyi, 5 %). Friedman's test over all of them: p = {friedman.pvalue:.3g}.",
        figure,
    )


def heads_and_methods(context: PlotContext) -> Iterator[Plot]:
    """Where settings differ only in their head: each method's score by head. Lines that cross show an interaction."""
    settings = context.runs.drop_duplicates("setting").set_index("setting")
    shared = [facet for facet in FACETS if facet != "head"]
    heads = [group["head"].sort_values() for _, group in settings.groupby(shared) if group["head"].nunique() > 1]
    titles = {str(group.index[0]): ", ".join(settings.loc[group.index[0], ["backbone", "dataset", "budget"]])
              for group in heads}  # fmt: skip
    of_panel = {str(group.index[0]): group for group in heads}
    for number, figure, panel in panels(titles, 3.0, top=legend_height(context)):
        for first, axes in panel.items():
            group = of_panel[first]
            rows = context.averages[context.averages.setting.isin(list(group.index))]
            places = {setting: place for place, setting in enumerate(group.index)}
            for label, own in rows.groupby("label"):
                style, x = context.styles[str(label)], own.setting.map(places)
                line = own.assign(x=x).sort_values("x")
                axes.plot(line.x, line.miou, color=style.colour, marker=style.marker, linestyle=style.line,
                          markersize=5 * style.size)  # fmt: skip
                axes.vlines(line.x, line.miou - line.bar, line.miou + line.bar, colors=style.colour, linewidth=1.0)
            axes.set_xticks(range(len(group)), [shortened(head, 20) for head in group])
            axes.margins(x=0.15)
            axes.yaxis.set_major_formatter(PERCENT)
        add_legend(figure, context)
        figure.supylabel("mIoU, %", fontsize=8, color=MUTED)
        yield Plot(
            numbered("heads", number, titles),
            "statistics",
            "Heads and methods",
            f"Mean over {context.seeds()}; {BARS}. Where lines cross, the better method depends on the head.",
            figure,
        )


def dev_against_test(context: PlotContext, dev_test: pd.DataFrame) -> Iterator[Plot]:
    """Each tuned method's score on the dev part, by which it was chosen, against its score on the test part."""
    rows = dev_test[dev_test.setting.isin(list(context.titles))]
    titles = {setting: title for setting, title in context.titles.items() if (rows.setting == setting).sum() > 1}
    for number, figure, panel in panels(titles, 3.0, top=legend_height(context)):
        for setting, axes in panel.items():
            here = rows[rows.setting == setting]
            for row in rows_of(here):
                style = context.styles[row.label]
                axes.plot(row.dev, row.test, style.marker, color=style.colour, markersize=5.5 * style.size,
                          mfc=PAPER if row.doubts else style.colour)  # fmt: skip
            if not here.tau.isna().all():
                axes.set_title(f"{titles[setting]}: τ = {here.tau.iloc[0]:.2f}")
            axes.margins(0.12)
            axes.xaxis.set_major_formatter(PERCENT)
            axes.yaxis.set_major_formatter(PERCENT)
        add_legend(figure, context)
        figure.supxlabel("mIoU on dev, %", fontsize=8, color=MUTED)
        figure.supylabel("mIoU on test, %", fontsize=8, color=MUTED)
        yield Plot(
            numbered("dev-test", number, titles),
            "statistics",
            "Dev and test",
            "Dev: the chosen trial's score. Test: mean over seeds of the runs with its hyperparameters. τ: Kendall's, "
            "of the two orders. Hollow: a chosen hyperparameter is at an edge of its range, or all trials tied.",
            figure,
        )
