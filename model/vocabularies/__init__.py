"""Tokenizers of every kind behind one class, and the fastest encoders whose ids are the same."""
