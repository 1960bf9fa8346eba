"""Processes: a function run in one of its own, a child under a hard limit, and Ctrl-C."""
