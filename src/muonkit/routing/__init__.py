"""Routing: which parameter is trained by what, in which view, and why."""

from muonkit.routing.routes import Route, Routes, RoutingError, Rule, route

__all__ = ["Route", "Routes", "RoutingError", "Rule", "route"]
