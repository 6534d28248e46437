"""One run from open to close; the only room importing Ray."""
