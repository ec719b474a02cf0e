"""The instrument: what the optimizer does while it trains, read and never written to."""

from muonkit.monitor.monitor import Monitor

__all__ = ["Monitor"]
