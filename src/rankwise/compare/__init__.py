"""Comparing methods under equal budgets: run them, keep the results, show them."""
