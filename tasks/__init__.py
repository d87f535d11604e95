"""The cached steps of a run: download, tokenize, mix, train, export, and what identifies them."""
