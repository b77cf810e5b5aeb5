"""Data: corpora, tokenizer, packing, and the loader of global batches. Nothing is imported here."""
