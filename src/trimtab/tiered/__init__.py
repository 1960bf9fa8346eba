"""Tables whose rows live in a slow tier (a memory-mapped file or RAM) and are fetched when they are needed."""
