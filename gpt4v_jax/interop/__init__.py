"""Weights in and out: Hugging Face folders (hf.py, families/), llama2.c files, parts of a model (parts.py)."""
