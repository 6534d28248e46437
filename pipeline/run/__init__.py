"""One run from open to close; the only room that imports Ray."""
