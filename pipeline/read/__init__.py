"""An input -> its shards -> records of encoded bytes."""
