"""Reads documents out of files: text, JSON and parquet, plain or compressed; conversations with the parts to be learned."""
