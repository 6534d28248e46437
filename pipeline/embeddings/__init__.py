"""Search, duplicates and indexes over a finished table of embeddings."""
