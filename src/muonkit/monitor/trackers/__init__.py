"""Sinks of a `muonkit.Monitor` for experiment trackers: `tensorboard`, `wandb`, `trackio`.

::

    from muonkit import Monitor
    from muonkit.monitor.trackers.tensorboard import TensorBoard

    monitor = Monitor(optimizer, every=100, to=TensorBoard("runs/one"))

A tracker's package is imported when its sink is made, and not before.
"""
