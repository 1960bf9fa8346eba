"""`trimtab train`: the verb, the session with the patched model, and the progress display."""
