"""Commands and pictures made from a finished table of masks."""
