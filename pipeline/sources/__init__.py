"""One module a corpus: its annotation files to sessions."""
