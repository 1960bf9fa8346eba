"""What a run will use, said before it starts: the plan, the search for one that fits, and its calibration."""
