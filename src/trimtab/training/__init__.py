"""Training as a user sees it: the verb, the patched model it trains, and the progress it shows."""
