"""Synthetic corpora in the official layouts: to try the tool, to test it, and to see it learn."""
