"""Figures: their style, plots, and explorers with sliders."""
