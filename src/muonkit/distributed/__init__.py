"""Ranks: who stores, computes and receives what. Nothing here knows of Newton-Schulz.

`placement`, `machines`, `transfers`, `plan_batches` and `plan` are plain Python without torch, and
plan a real step and a simulated one alike.
"""
