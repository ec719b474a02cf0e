"""Sinks for `muonkit.Monitor`, one file for each tracker, through its own API::

    from muonkit import Monitor
    from muonkit.integrations.tensorboard import TensorBoard

    monitor = Monitor(optimizer, every=100, to=TensorBoard("runs/one"))

A tracker is imported when its sink is made, and not before.
"""
