"""Learning curves: training loss and the mIoU of the training crops, mean over seeds."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
from matplotlib.ticker import EngFormatter

from reports.render.plots.context import PERCENT, Plot, PlotContext, add_legend, legend_height, numbered, panels
from reports.render.style import MUTED, PAPER


def learning_curves(context: PlotContext, curves: pd.DataFrame) -> Iterator[Plot]:
    points = curves.merge(context.runs[["fingerprint", "setting", "label"]], on="fingerprint")
    for column, title, axis in (
        ("miou_train", "mIoU during training", "mIoU of the training crops, %"),
        ("loss", "Training loss", "loss"),
    ):
        known = points.dropna(subset=[column])
        if known.empty:
            continue
        means = known.groupby(["setting", "label", "step"])[column].mean().reset_index()
        for number, figure, panel in panels(context.titles, 2.6, top=legend_height(context)):
            for setting, axes in panel.items():
                for label, line in means[means.setting == setting].groupby("label"):
                    style = context.styles[label]
                    axes.plot(
                        line.step, line[column], color=style.colour, linestyle=style.line, linewidth=1.1,
                        marker=style.marker, markersize=4 * style.size, markevery=0.2, mec=PAPER, mew=0.4,
                    )  # fmt: skip
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
                if column == "miou_train":
                    axes.yaxis.set_major_formatter(PERCENT)
            add_legend(figure, context)
            figure.supxlabel("optimiser step", fontsize=8, color=MUTED)
            figure.supylabel(axis, fontsize=8, color=MUTED)
            yield Plot(
                numbered(f"curves-{column.replace('_', '-')}", number, context.titles),
                "curves",
                title,
                f"Mean over {context.seeds()}. Measured on the augmented training crops, so it does not estimate the "
                "test score.",
                figure,
            )
