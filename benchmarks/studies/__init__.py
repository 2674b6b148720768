"""Questions that a table of ratios does not answer, each with its evidence and a text made from the figures."""
