"""Sinks of a Monitor for experiment trackers, each for those who have its package."""
