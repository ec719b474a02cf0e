"""What other packages need of muonkit beyond `MuonW(model)`, one file for each.

Trainers: `transformers`, `accelerate`, `lightning`, `timm`. Trackers, as sinks of a
`muonkit.Monitor`: `tensorboard`, `wandb`, `trackio`::

    from muonkit import Monitor
    from muonkit.monitor.trackers.tensorboard import TensorBoard

    monitor = Monitor(optimizer, every=100, to=TensorBoard("runs/one"))

A trainer's package is imported by its file, a tracker when its sink is made, and neither before.
"""
