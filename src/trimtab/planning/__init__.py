"""Predicts what a run will use before it starts: the plan, the search for one that fits, and its calibration."""
