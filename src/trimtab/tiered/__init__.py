"""Tables whose rows stay in a slow tier (a memory-mapped file or RAM) and are fetched when they are used."""
