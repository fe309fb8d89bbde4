"""Colours and settings of pictures; colours that eyes of every kind tell apart (Okabe and Ito)."""

from __future__ import annotations

BLUE, SKY, RED, ORANGE, GREY = "#0072B2", "#56B4E9", "#CC3311", "#E69F00", "#555555"
GREEN, PINK = "#009E73", "#CC79A7"
INK, RULE, PAPER = "#1B1B1B", "#C9C9C9", "#FFFFFF"
STYLE = {
    "font.size": 10, "axes.titlesize": 9.5, "figure.titlesize": 11.5, "legend.fontsize": 9.5,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.8,
    "lines.markersize": 5.5, "legend.frameon": False,
}  # fmt: skip
