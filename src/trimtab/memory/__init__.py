"""Budgets, the memory meter, the guard, and the choice of a malloc."""
