"""Datasets and token stores in SeqIO's terms. Everything that imports SeqIO or TensorFlow is here, and runs in processes of its own."""
